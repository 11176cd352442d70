"""The Zarr v3 data type ``bfloat16`` for zarr-python, registered by the ``zarr.data_type`` entry point.

zarr-python has no bfloat16 of its own. With actstore installed, ``zarr.open`` returns such arrays as
``ml_dtypes.bfloat16``. Name and fill values follow the zarr-extensions entry ``data-types/bfloat16``.

zarr-python 3.1, the newest for Python 3.11, collects ``zarr.data_type`` entry points but never loads them (3.4
does). It does load ``zarr.buffer`` entry points when it opens a group, so this module is also named there, with
zarr's own default buffer, and registers the type when imported. Opening an array by its own path with zarr 3.1
takes ``import actstore.store.format.bfloat16`` first.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard, cast

import ml_dtypes
import numpy as np
from zarr.core.buffer.cpu import Buffer
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.core.dtype.npy.common import check_json_float_v3, float_from_json_v3, float_to_json_v3
from zarr.core.dtype.wrapper import ZDType

__all__ = ["BFloat16", "Buffer"]

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """bfloat16 has two bytes: sign, 8 exponent bits, 7 fraction bits.

    ``HasEndianness`` keeps ``{"endian": "little"}`` in the metadata of arrays that zarr-python itself creates;
    other readers refuse a two-byte type without it.
    """

    dtype_cls = type(_NATIVE)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        if cls._check_native_dtype(dtype):
            return cls()
        raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected ml_dtypes.bfloat16.")

    @classmethod
    def _check_native_dtype(cls, dtype: Any) -> TypeGuard[Any]:
        return bool(dtype == _NATIVE)

    def to_native_dtype(self) -> Any:
        return _NATIVE

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"Zarr format 2 has no bfloat16. Got {data!r}.")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"Invalid JSON representation of {cls.__name__}: {data!r}.")

    def to_json(self, zarr_format: Any) -> Any:
        if zarr_format == 3:
            return self._zarr_v3_name
        raise ValueError("Zarr format 2 has no bfloat16.")

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.floating | np.integer | ml_dtypes.bfloat16)

    def cast_scalar(self, data: object) -> Any:
        if self._check_scalar(data):
            return ml_dtypes.bfloat16(cast(float, data))
        raise TypeError(f"Cannot convert {data!r} of type {type(data)} to bfloat16.")

    def default_scalar(self) -> Any:
        return ml_dtypes.bfloat16(0.0)

    def to_json_scalar(self, data: object, *, zarr_format: Any) -> Any:
        del zarr_format
        return float_to_json_v3(np.float32(cast(float, data)))

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        del zarr_format
        if check_json_float_v3(data):
            return ml_dtypes.bfloat16(float_from_json_v3(data))
        raise TypeError(f"Invalid fill value for bfloat16: {data!r}.")


data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
