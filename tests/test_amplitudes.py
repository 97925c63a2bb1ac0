"""Amplitudes among the options of methods: written as an eps is, 4/255 or 0.03, and a bare 4 is refused like one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest

from vlmdefend.attacks import ATTACKS
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.composed import create_defense
from vlmdefend.errors import UserError
from vlmdefend.registry import ReadBy, Registry, check_options

AMPLITUDES = [
    *("ttc:eps", "ttc:alpha", "doc:eps", "doc:alpha", "csr:eps", "csr:alpha", "hedge:eps", "hedge:alpha", "mac:eps"),
    *("aom:sigma", "noise:sigma", "tapt:known_eps"),
]
SHADES = ["random_pad:brightest", "resize_pad:fill", "ttp:brightest"]
LENGTHS = ["randomized_smoothing:sigma", "anti_adversary:alpha", "et3:alpha", "et3:radius"]
ADAPTED = ["at-pl", "trades-pl", "vat", "srouda", "artuda", "dart-dad"]


def value(option: str, written: str, registry: Registry[Any] = DEFENSES) -> Any:
    """What the method has for ``option`` where it is ``written`` so."""
    return registry.create(f"{option}={written}").spec()[option.partition(":")[2]]


@pytest.mark.parametrize("option", AMPLITUDES + SHADES + LENGTHS)
def test_a_fraction_and_a_decimal_are_read(option: str) -> None:
    assert value(option, "4/255") == 4 / 255
    assert value(option, "0.03") == 0.03
    assert value(option, repr(8 / 255)) == 8 / 255, "as a program writes it"
    with pytest.raises(UserError, match=f"^{option}='-0.1' must be a finite number that is zero or more"):
        value(option, "-0.1")
    with pytest.raises(UserError, match=f"^{option}='none' is not a finite number; write it as a fraction"):
        value(option, "none")


@pytest.mark.parametrize("option", AMPLITUDES)
@pytest.mark.parametrize("levels", ["1", "2", "4", "8"])
def test_a_bare_number_of_levels_is_met_with_the_fraction(option: str, levels: str) -> None:
    with pytest.raises(UserError) as refused:
        value(option, levels)
    assert str(refused.value) == (
        f"{option}='{levels}' is as large as the whole pixel range [0, 1]; did you mean {levels}/255?"
    )


@pytest.mark.parametrize("option", SHADES)
def test_a_brightness_reaches_white_and_no_further(option: str) -> None:
    assert value(option, "1") == 1.0
    with pytest.raises(UserError, match=rf"^{option}='10' is brighter than white, which is 1; did you mean 10/255\?"):
        value(option, "10")


@pytest.mark.parametrize("option", LENGTHS)
def test_what_is_no_pixel_amplitude_may_exceed_one(option: str) -> None:
    assert value(option, "1.5") == 1.5


def test_a_step_of_anti_adversary_is_one_in_pixels_where_it_says_so() -> None:
    with pytest.raises(UserError, match=r"alpha=4 with normalized=False .*did you mean 4/255\?"):
        DEFENSES.create("anti_adversary:alpha=4:normalized=no")
    assert DEFENSES.create("anti_adversary:alpha=4/255:normalized=no").spec()["alpha"] == 4 / 255


def test_values_that_are_no_text_are_taken_as_they_are() -> None:
    assert DEFENSES.create("ttc", eps=0.0, threshold=9.0).spec()["eps"] == 0.0
    assert DEFENSES.create("noise", sigma=8 / 255).spec()["sigma"] == 8 / 255


def test_a_defense_inside_of_another_is_held_to_it() -> None:
    for text in ("interpolate:of=[ttc:eps=4]", "jpeg+ttc:eps=4"):
        with pytest.raises(UserError, match=r"^ttc:eps='4' .*did you mean 4/255"):
            create_defense(text)


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("option", ["eps", "alpha"])
def test_attacks_of_adaptations_are_written_so_too(name: str, option: str) -> None:
    assert value(f"{name}:{option}", "8/255", ADAPTATIONS) == 8 / 255
    with pytest.raises(UserError, match=r"did you mean 8/255\?"):
        value(f"{name}:{option}", "8", ADAPTATIONS)


@pytest.mark.parametrize("attack", ["pgd", "feature", "universal", "mi", "co", "patch", "torchattacks:PGD"])
def test_a_step_of_an_attack_is_written_as_an_eps_is(attack: str) -> None:
    ATTACKS.create(f"{attack}:alpha=1/255")
    with pytest.raises(UserError, match=r"alpha='4' is as large as the whole pixel range \[0, 1\]; did you mean 4/255"):
        ATTACKS.create(f"{attack}:alpha=4")


@pytest.mark.parametrize("written", ["eps/0", "2.5eps/0.0", "fast", "eps/", "none"])
def test_a_step_that_is_no_number_is_refused_before_the_attack_runs(written: str) -> None:
    with pytest.raises(UserError, match=r"Write eps/4, 2\.5eps/steps, or a number such as 1/255"):
        ATTACKS.create(f"pgd:alpha={written}")


def test_a_step_of_torchattacks_in_l2_is_a_length() -> None:
    assert dict(ATTACKS.create("torchattacks:PGDL2:alpha=1.5").spec())["alpha"] == 1.5


@dataclass(frozen=True, kw_only=True)
class Read:
    name: ClassVar[str] = "read"
    length: Annotated[float, ReadBy(lambda text, option: float(f"{len(text)}.{len(option)}"))] = 0.0
    of: str = "other"
    most: int | None = 3


def test_an_option_may_say_how_its_text_is_read() -> None:
    assert check_options("widget", Read, {"length": "abc"}) == {"length": 3.11}, "read:length has 11 letters"
    assert check_options("widget", Read, {"length": 2}) == {"length": 2.0}, "what is no text is left to the type"


def test_none_is_no_value_only_where_an_option_may_have_none() -> None:
    assert check_options("widget", Read, {"most": "None"}) == {"most": None}
    assert check_options("widget", Read, {"of": "none"}) == {"of": "none"}
