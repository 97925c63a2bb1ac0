"""What an image draws depends on (seed, purpose, id) alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdefend.rng import ImageRng, opaque

DRAWS = {
    "uniform": lambda rng: rng.uniform((2, 3), -1.0, 1.0),
    "normal": lambda rng: rng.normal((2, 3)),
    "integers": lambda rng: rng.integers((2, 3), 0, 10**6),
}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@draws
@settings(max_examples=25, deadline=None)
@given(order=st.permutations(["a", "b", "c", "d"]), count=st.integers(1, 4))
def test_a_draw_depends_neither_on_the_batch_nor_on_the_order(draw, order, count) -> None:  # type: ignore[no-untyped-def]
    alone = {name: draw(ImageRng(5, [name]))[0] for name in order}
    together = draw(ImageRng(5, order[:count]))
    assert all(torch.equal(together[i], alone[name]) for i, name in enumerate(order[:count]))


@draws
def test_seeds_purposes_and_ids_draw_differently(draw) -> None:  # type: ignore[no-untyped-def]
    first = draw(ImageRng(0, ["a"], "x"))
    assert torch.equal(first, draw(ImageRng(0, ["a"], "x")))
    for other in (ImageRng(1, ["a"], "x"), ImageRng(0, ["b"], "x"), ImageRng(0, ["a"], "y"), ImageRng(-1, ["a"], "x")):
        assert not torch.equal(first, draw(other))


def test_a_selection_draws_on_from_the_same_streams() -> None:
    whole, part = ImageRng(0, ["a", "b", "c"]), None
    expected = [ImageRng(0, ["a", "b", "c"]).normal((2 * 4,))[i] for i in range(3)]
    assert torch.equal(whole.normal((4,))[1], expected[1][:4])
    part = whole.select(torch.tensor([2, 1]))
    assert part.names == [opaque("c"), opaque("b")]
    drawn = part.normal((4,))
    rest = whole.normal((4,))
    follows = ImageRng(0, ["b"])
    follows.normal((4,))
    assert torch.equal(drawn[1], follows.normal((4,))[0]), "b went on where the whole batch had left it"
    assert torch.equal(rest[1], follows.normal((4,))[0]), "and the whole batch goes on where the selection left it"


def test_a_list_selects_as_a_tensor_does() -> None:
    by_list, by_tensor = (ImageRng(0, ["a", "b", "c"]).select(i) for i in ([2, 0], torch.tensor([2, 0])))
    assert torch.equal(by_list.normal((3,)), by_tensor.normal((3,)))


def test_a_child_is_another_stream_and_does_not_disturb_its_parent() -> None:
    parent = ImageRng(0, ["a"], "attack")
    child, again = parent.child("restart 1"), parent.child("restart 1")
    drawn = child.normal((3,))
    assert torch.equal(drawn, again.normal((3,)))
    assert not torch.equal(drawn, parent.child("restart 2").normal((3,)))
    assert torch.equal(parent.normal((3,)), ImageRng(0, ["a"], "attack").normal((3,)))


def test_draws_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    for draw in DRAWS.values():
        draw(ImageRng(0, ["a", "b"]))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_have_the_ranges_they_say() -> None:
    rng = ImageRng(0, [str(i) for i in range(50)])
    uniform = rng.uniform((100,), 2.0, 3.0)
    assert 2.0 <= float(uniform.min()) < 2.05 < 2.95 < float(uniform.max()) < 3.0
    integers = rng.integers((100,), 3, 6)
    assert set(integers.flatten().tolist()) == {3, 4, 5}
    normal = rng.normal((400,))
    assert float(normal.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(normal.std()) == pytest.approx(1.0, abs=0.02)


def test_no_image_is_no_draw() -> None:
    assert ImageRng(0, []).normal((3, 4)).shape == (0, 3, 4)


def test_streams_tell_images_apart_and_do_not_tell_their_ids() -> None:
    """An id may be ``class/file``: what a defense is shown must not say the label."""
    ids = ["bag/0.png", "coat/0.png", "coat/1.png"]
    whole = ImageRng(0, ids, "deployed")
    for rng in (whole, whole.child("x"), whole.select([2, 0, 1])):
        assert len(set(rng.names)) == 3
        shown = [name for name in dir(rng) if not name.startswith("_")]
        assert set(shown) == {"child", "integers", "names", "normal", "purpose", "seed", "select", "uniform"}
        assert not any(word in text for text in [*rng.names, rng.purpose] for word in ("bag", "coat", "png"))


def test_the_streams_are_those_of_every_record_so_far() -> None:
    """Another derivation would change every number of a stochastic method without a word."""
    drawn = ImageRng(3, ["coat/0.png"], "attacker").child("start").integers((4,), 0, 1000)
    assert drawn.tolist() == [[661, 418, 870, 896]]
