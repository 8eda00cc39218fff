"""The table of phases against sums done by hand, and its accounting for any ramps."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.arch.resolve import fields_from_directory, newest_step
from llmtrain.config.ramp import Phase, longest_row, phase_at, phases, ramp_faults, total_tokens, trained_model
from llmtrain.config.schema import BatchRamp, ModelConfig, RopeScaling, SeqRamp, TrainConfig

RAMPED = TrainConfig(
    steps=20,
    seq_len=64,
    global_batch_seqs=8,  # 512 tokens a step
    batch_ramp=[BatchRamp(from_tokens=1500, global_batch_seqs=16), BatchRamp(from_tokens=6000, global_batch_seqs=32)],
    seq_ramp=[SeqRamp(from_tokens=3000, seq_len=128, rope_theta=5e5), SeqRamp(from_tokens=6100, seq_len=256)],
)


def test_phases_by_hand() -> None:
    assert phases(RAMPED) == (
        Phase(0, 0, 8, 64),
        Phase(3, 1536, 16, 64),  # 1536 is the first multiple of 512 from 1500 on
        Phase(5, 3584, 16, 128, 5e5),  # 1536 + 2 x 1024
        Phase(7, 7680, 32, 256, 5e5),  # 3584 + 2 x 2048: both entries before 7680 take effect at once
    )
    assert [phase_at(RAMPED, step).first_step for step in (0, 2, 3, 6, 7, 19)] == [0, 0, 3, 5, 7, 7]
    assert total_tokens(RAMPED) == 7680 + 13 * 32 * 256
    assert longest_row(RAMPED) == 256 and list(ramp_faults(RAMPED)) == []


def test_phases_behind_the_last_step_are_left_out_but_rows_are_cut_from_the_same_length() -> None:
    short = RAMPED.model_copy(update={"steps": 5})
    assert phases(short) == phases(RAMPED)[:2] and longest_row(short) == 256
    assert phases(TrainConfig()) == (Phase(0, 0, 8, 2048),)


def test_llama3_batches() -> None:
    """arXiv 2407.21783, section 3.4.1: 4M tokens of 4,096, 8M of 8,192 after 252M, 16M after 2.87T."""
    train = TrainConfig(
        steps=1_000_000,
        seq_len=4096,
        global_batch_seqs=1024,
        batch_ramp=[BatchRamp(from_tokens=2_870_000_000_000, global_batch_seqs=2048)],
        seq_ramp=[SeqRamp(from_tokens=252_000_000, seq_len=8192)],
    )
    assert [phase.tokens_per_step >> 20 for phase in phases(train)] == [4, 8, 16]
    assert [phase.first_step for phase in phases(train)] == [0, 61, 61 + 342101]  # ceil((2.87e12 - 61 x 2^22) / 2^23)


powers = st.integers(0, 3).map(lambda n: 2**n)
starts = st.sets(st.integers(1, 4000), max_size=4).map(sorted)


@given(starts, starts, st.data(), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_every_token_is_counted_once(batch: list[int], seq: list[int], data: st.DataObject, steps: int) -> None:
    train = TrainConfig(
        steps=steps,
        seq_len=8 * data.draw(powers),
        global_batch_seqs=8 * data.draw(powers),
        batch_ramp=[BatchRamp(from_tokens=n, global_batch_seqs=8 * data.draw(powers)) for n in batch],
        seq_ramp=[SeqRamp(from_tokens=n, seq_len=8 * data.draw(powers)) for n in seq],
    )
    assert list(ramp_faults(train)) == []
    token, entries = 0, [*train.batch_ramp, *train.seq_ramp]
    for step in range(steps):
        phase = phase_at(train, step)
        assert phase.token_at(step) == token and token % longest_row(train) == 0
        due = [e for e in entries if e.from_tokens <= token]
        rows = [e.seq_len for e in due if isinstance(e, SeqRamp)]
        sizes = [e.global_batch_seqs for e in due if isinstance(e, BatchRamp)]
        assert phase.seq_len == [train.seq_len, *rows][-1]
        assert phase.global_batch_seqs == [train.global_batch_seqs, *sizes][-1]
        token += phase.tokens_per_step
    assert total_tokens(train) == token


def test_the_model_of_a_checkpoint_has_the_rope_of_its_last_step(tmp_path: Path) -> None:
    scaling = RopeScaling(factor=4.0)
    ramp = [RAMPED.seq_ramp[0], SeqRamp(from_tokens=6100, seq_len=256, rope_scaling=scaling)]
    train = RAMPED.model_copy(update={"seq_ramp": ramp})
    model = ModelConfig()
    ropes = [(m.rope_theta, m.rope_scaling) for m in (trained_model(model, train, n) for n in (0, 5, 6, 7, 8, 20, 99))]
    assert ropes == [(1e4, None)] * 2 + [(5e5, None)] * 2 + [(5e5, scaling)] * 3
    (tmp_path / "config.yaml").write_text(
        "train: {steps: 20, seq_len: 64, seq_ramp: [{from_tokens: 3000, seq_len: 128, rope_theta: 5e5}]}"
    )
    assert newest_step(str(tmp_path)) == 0 and fields_from_directory(str(tmp_path), {})["rope_theta"] == 1e4
    for name in ("step-00000006", "step-00000007.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(str(tmp_path)) == 6 and fields_from_directory(str(tmp_path), {})["rope_theta"] == 1e4
    (tmp_path / "checkpoints/step-00000007").mkdir()
    assert fields_from_directory(str(tmp_path), {})["rope_theta"] == 5e5
