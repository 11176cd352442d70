"""Hooks that can be edited say what an edit reaches within its layer, and only these do."""

from actstore.hooks.naming.hook_points import POINTS


def test_hooks_that_can_be_edited_say_what_an_edit_reaches() -> None:
    for point in POINTS:
        can_be_edited = point.in_layer and not point.is_read_only
        assert (point.reach is not None) == can_be_edited, point.leaf
        if point.axes[1:2] == ("kv_head",):  # keys and values, which later positions read
            assert point.reach == "keys", point.leaf
