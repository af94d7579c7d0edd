import signal
from pathlib import Path

from tests import commands
from tests.pretrain.runs import arguments, assert_same, wait_for_checkpoint

SHARDS = ("--dataset", "wds/x", "--num-classes", 5, "--epochs", 3, "--mixup", 0.2, "--hflip", 0.5)
SHARDS += ("--train-split", "train-{0000..0001}.tar|122", "--val-split", "validation-0000.tar|37")


def test_a_stream_that_is_interrupted_and_resumed_is_the_straight_run(shards: Path, tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "run"
    commands.run(*arguments(shards, straight, *SHARDS, "--workers", 1), check=True)
    command = commands.Command(*arguments(shards, out, *SHARDS, "--workers", 1))
    wait_for_checkpoint(out, command)
    command.send_signal_to_group(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM
    commands.run(*arguments(shards, out, *SHARDS, "--workers", 1, "--resume"), check=True)
    assert_same(out, straight)
