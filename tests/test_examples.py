"""The examples, on a smaller scale than their readers run them."""

from pathlib import Path
from statistics import mean

import pytest

from examples import grpo_countdown
from examples.grpo_countdown import END, reward_of


def test_grpo_learns_and_its_two_models_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rollouts' log-probabilities are the trainer's, after each update of the weights."""
    picture = tmp_path / "reward.png"
    arguments = ["--steps", "25", "--answers", "16", "--plot", str(picture)]
    history = grpo_countdown.main(arguments)
    assert len(history["reward"]) == len(history["difference"]) == 25
    assert max(history["difference"]) < 1e-4
    assert mean(history["reward"][-5:]) > 3 * mean(history["reward"][:5])
    assert "step  24: reward 0." in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_reward_of_grpo() -> None:
    question = [11, 3]
    assert reward_of(question, [2, 1, 0, END]) == 1
    assert reward_of(question, [2, 1, 1, END]) == reward_of(question, [2, 1]) == 0.5
    assert reward_of(question, [1, 0, END]) == reward_of(question, [END]) == 0
