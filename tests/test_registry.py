import pytest

from secateur.errors import UnknownNameError
from secateur.registry import Registry


@pytest.fixture
def registry():
    one = Registry("fruit")
    one.add("apple", 1)
    one.add("banana", 2)
    return one


def test_entries_keep_their_order_and_are_found_by_exact_name(registry):
    assert registry.names() == list(registry) == ["apple", "banana"]
    assert registry.get("banana") == 2
    assert "apple" in registry
    assert "Apple" not in registry


def test_register_returns_what_it_registers(registry):
    @registry.register("pear")
    def pear():
        return 3

    assert pear() == 3
    assert registry.get("pear") is pear


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="fruit 'apple' is registered twice"):
        registry.add("apple", 9)
    assert registry.get("apple") == 1


def test_a_wrong_name_is_answered_with_the_nearest(registry):
    with pytest.raises(UnknownNameError) as caught:
        registry.get("bananna")
    assert str(caught.value) == "unknown fruit 'bananna': did you mean 'banana'? known are apple, banana"
    with pytest.raises(UnknownNameError) as caught:
        registry.get("xyz")
    assert str(caught.value) == "unknown fruit 'xyz': known are apple, banana"
