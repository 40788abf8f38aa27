"""Configuration: recipes, overrides and saved configs, and one clear sentence for everything that is wrong in them."""

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from tessera.config import Config, read_config, read_recipe, validate
from tessera.errors import InputError, nearest


class Cat(Config):
    type: Literal["cat"] = "cat"
    whiskers: int = 12


class Dog(Config):
    type: Literal["dog"] = "dog"
    tail_length: float = 0.3


class Optimizer(Config):
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Recipe(Config):
    steps: int = Field(ge=1)
    name: str = "run"
    optimizer: Optimizer = Optimizer()
    pet: Annotated[Cat | Dog, Field(discriminator="type")] = Cat()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 10\npet: {type: dog, tail_length: 0.5}\noptimizer:\n  learning_rate: 1e-4\n", "utf-8")
    return path


def test_a_recipe_becomes_a_frozen_config(recipe: Path) -> None:
    config = read_recipe(Recipe, recipe)
    assert (config.steps, config.pet, config.optimizer.betas) == (10, Dog(tail_length=0.5), (0.9, 0.95))
    assert config.optimizer.learning_rate == 1e-4  # YAML reads 1e-4 as a string
    with pytest.raises(ValidationError):
        config.steps = 11  # type: ignore[misc]


def test_overrides_reach_every_depth(recipe: Path) -> None:
    overrides = ["steps=3", "optimizer.learning_rate=2e-3", "optimizer.betas=[0.5, 0.9]", "name=a=b", "pet={type: cat}"]
    config = read_recipe(Recipe, recipe, overrides)
    assert (config.steps, config.optimizer.learning_rate, config.optimizer.betas) == (3, 2e-3, (0.5, 0.9))
    assert (config.name, config.pet) == ("a=b", Cat())


def test_an_override_may_name_a_block_the_file_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("steps: 1\n", "utf-8")
    assert read_recipe(Recipe, path, ["optimizer.learning_rate=0.5"]).optimizer.learning_rate == 0.5


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["step=3"], "unknown key 'step', did you mean 'steps'?"),
        (["optimizer.learning_rat=3"], "unknown key 'optimizer.learning_rat', did you mean 'learning_rate'?"),
        (["pet.tail_lenght=3"], "did you mean 'tail_length'?"),
        (["optimizer.learning_rate=-1"], "greater than 0, got -1"),
        (["steps=many"], "steps: .*valid integer.*got 'many'"),
        (["steps=0"], "steps: .*greater than or equal to 1, got 0"),
        (["pet.type=horse"], "pet"),
        (["steps"], "the override 'steps' must look like key.sub=value"),
        (["=3"], "the override '=3' must look like key.sub=value"),
        (["steps.more=3"], "goes below 'steps', which is a plain value"),
        (["name=[1"], "is not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_sentence(recipe: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        read_recipe(Recipe, recipe, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"steps: [1", "is not valid YAML"),
        (b"- 1\n- 2\n", "must hold keys and values, got list"),
        (b"", "must hold keys and values, got NoneType"),
        (b"\xff", "line 1: not UTF-8 text"),
        (b"name: x\n", "the key 'steps' is missing; add it"),
    ],
)
def test_a_broken_recipe_is_one_sentence_that_names_the_file(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        read_recipe(Recipe, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.yaml is not a file"):
        read_recipe(Recipe, tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="is not a file"):
        read_recipe(Recipe, tmp_path)


def test_a_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = Recipe(steps=7, pet=Dog(tail_length=0.25))
    (tmp_path / "config.json").write_text(config.model_dump_json(), "utf-8")
    assert read_config(Recipe, tmp_path) == config


def test_a_broken_saved_config_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config.json"):
        read_config(Recipe, tmp_path)
    path = tmp_path / "config.json"
    path.write_text('{"steps": ', "utf-8")
    with pytest.raises(InputError, match="config.json is not valid JSON"):
        read_config(Recipe, tmp_path)
    path.write_text(json.dumps({"steps": 1, "stepz": 2}), "utf-8")
    with pytest.raises(InputError, match="unknown key 'stepz', did you mean 'steps'?"):
        read_config(Recipe, tmp_path)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(InputError) as caught:
        validate(Recipe, {"steps": "9" * 5000 + "x"}, where="here")
    assert str(caught.value).startswith("here: steps: ") and len(str(caught.value)) < 300


def test_nearest_lists_all_names_when_none_is_near() -> None:
    assert nearest("qqqq", ["depth", "dim"]) == "; known are depth, dim"


@pytest.fixture(scope="session")
def short_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "short.yaml"
    path.write_text("steps: 1\n", "utf-8")
    return path


@given(steps=st.integers(1, 10**9), rate=st.floats(1e-300, 1e300), name=st.text("ab0:=.# 红", max_size=8))
def test_an_override_reads_as_what_it_says(short_recipe: Path, steps: int, rate: float, name: str) -> None:
    overrides = [f"steps={steps}", f"optimizer.learning_rate={rate}", f"name={json.dumps(name)}"]
    config = read_recipe(Recipe, short_recipe, overrides)
    assert (config.steps, config.optimizer.learning_rate, config.name) == (steps, rate, name)
