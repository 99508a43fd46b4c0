"""Peak CPU memory of training is one block's and the activations', whatever the model: a second block does not fit."""

from pathlib import Path

from benchmarks.scaling.train_memory import block_weights, make_model, run_child

HIDDEN, INTERMEDIATE, BLOCKS = 640, 2560, 12
# Weight, gradient and two moments in fp32 are 16 bytes a weight; 4 are for everything else: scales and zero-points, the
# linear that is differentiated, windows, libraries. Another block would take 4 a weight in fp32, 2 as it is stored.
BYTES_PER_WEIGHT = 20


def test_a_run_takes_one_block_and_no_more_though_the_checkpoint_is_larger_than_the_limit(tmp_path: Path) -> None:
    limit = BYTES_PER_WEIGHT * block_weights(HIDDEN, INTERMEDIATE)
    model = make_model(tmp_path / "model", BLOCKS, HIDDEN, INTERMEDIATE)
    (shard,) = model.glob("*.safetensors")
    assert shard.stat().st_size > 1.2 * limit
    settings = {"samples": 2, "seq_len": 16, "epochs": 1}
    one, two = run_child([model, model], limit, settings, hold=True)
    assert not one["error"] and (tmp_path / "model-trained" / "model.safetensors").exists()
    assert "allocate" in two["error"]  # with the block before kept


def test_blocks_leave_nothing_behind_in_memory(tmp_path: Path) -> None:
    shape = HIDDEN // 2, INTERMEDIATE // 2
    models = [make_model(tmp_path / str(blocks), blocks, *shape) for blocks in (3, BLOCKS)]
    few, many = (
        found["after"]["peak"] - found["before"]["resident"]
        for found in run_child(models, 0, {"samples": 2, "seq_len": 16, "epochs": 0})
    )
    assert many - few < 2 * 4 * block_weights(*shape)  # of nine more blocks
