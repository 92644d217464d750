"""What of torch the kernels rely on: each name is missed by name when it has moved."""

from __future__ import annotations

import re

import pytest
import torch

from dami_kernels import upstream
from dami_kernels.upstream import Moved, Place
from tests.moving import break_place, ways

BROKEN = [pytest.param(place, way, id=f"{place.path} {way}") for place in upstream.RELIED_ON for way in ways(place)]


@pytest.mark.parametrize(("place", "way"), BROKEN)
def test_what_has_moved_is_named_with_its_version(place: Place, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = break_place(monkeypatch, place, way)
    with pytest.raises(Moved) as raised:
        upstream.check("dami_kernels", upstream.RELIED_ON, {"torch": "2.13"}, "it")
    head, line = str(raised.value).splitlines()
    assert head == "dami_kernels does not fit what is installed:"
    assert line.startswith(f"  torch {torch.__version__} {said}")
    assert line.endswith(" (it was tested with 2.13)")


def test_a_package_that_is_not_installed_and_several_faults_at_once() -> None:
    places = Place("no_such_package:x"), Place("torch.nn:Module", does="fly", proof=lambda cls: cls().fly())
    with pytest.raises(Moved) as raised:
        upstream.check("this", places, {"no_such_package": "1", "torch": "2"}, "it")
    _, first, second = str(raised.value).splitlines()
    assert first.startswith("  no_such_package of an unknown version has no no_such_package:x: No module named")
    assert re.search("has a torch.nn:Module that does not fly: AttributeError: .*'fly'", second)


def test_what_is_asked_of_torch() -> None:
    assert not upstream.in_forward_mode()
    with torch.autograd.forward_ad.dual_level():
        assert upstream.in_forward_mode()
    assert not upstream.in_transforms()
    assert torch.func.vmap(lambda x: x + upstream.in_transforms())(torch.zeros(1)) == 1
    assert upstream.argument_names(torch.ops.aten.relu.default) == ["self"]
