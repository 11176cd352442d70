"""SAELens: train its SAEs on a store, stop and resume trainings, and make its caches.

Everything here is for SAELens 6.54: ``pip install 'actstore[saelens]'``. `train_sae` does it in one call; in parts, for
a trainer of your own::

    with data_provider("s3://bucket/run", "blocks.2.hook_resid_post", batch_size=4096, shuffle="window") as provider:
        trainer = SAETrainer(cfg, sae, provider, save_checkpoint_fn=save_checkpoint_fn(provider))
        if checkpoint is not None:
            resume(trainer, provider, checkpoint)
        prepare(trainer, provider)
        sae = trainer.fit()
"""

from actstore.integrations.saelens.cache_export import export_cache
from actstore.integrations.saelens.cache_import import import_cache
from actstore.integrations.saelens.checkpoint import resume, save_checkpoint_fn
from actstore.integrations.saelens.preset import prepare
from actstore.integrations.saelens.provider import DataProvider, data_provider
from actstore.integrations.saelens.training import train_sae

__all__ = [
    "DataProvider",
    "data_provider",
    "export_cache",
    "import_cache",
    "prepare",
    "resume",
    "save_checkpoint_fn",
    "train_sae",
]
