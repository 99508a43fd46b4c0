"""``eqat train``: the stages in turn, what they are measured with, and what they leave behind.

Everything that can be refused is refused first: model, settings, outputs, data. Then the full-precision model and
round-to-nearest are measured (where there is evaluation data), Block-AP runs, and E2E-QP on its result. The output
appears when its last stage is complete; settings, log and report are added to it then. Whatever else a run writes is
in the work folder, which goes away with it. A run that stops, for whatever reason, leaves there what it has finished,
and the same command goes on from that.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from formats import history
from formats.errors import EqatError, InputError, TrainingDivergedError

from ..block_ap.activations import bytes_to_train
from ..block_ap.run import BlockApSettings, run_block_ap
from ..config import save_config
from ..e2e_qat import run_e2e_qat
from ..e2e_qp.run import run_e2e_qp
from ..models.decoder import find_decoder_layers
from ..models.loading import build_skeleton, load_tokenizer
from ..options import TrainConfig
from ..ranks.group import joined
from ..ranks.orders import wait_for_all
from ..reporting.progress import Reporter
from ..reporting.reporters import CompositeReporter, EventRecorder, LogFileReporter, StageReporter
from ..resume.identity import tensor_fingerprint
from .measured import MeasuredRows
from .plan import TrainPlan, make_plan
from .results import Measurement, ModelResult
from .run_files import CONFIG_FILE, LOG_FILE, REPORT_FILE, publish, write_report
from .stage_settings import block_ap_settings, compute_target, e2e_settings, qat_settings
from .training_data import TrainingData, prepare_data
from .work_folder import WorkFolder

__all__ = ["TrainResult", "train"]

# A model is measured as a whole up to this size on a CPU, and up to this share of a GPU's free memory.
WHOLE_BYTES, WHOLE_SHARE = 2**28, 0.6


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        out: the native checkpoint.
        results: rows of the closing table, empty when nothing was measured.
        seconds: wall time.
    """

    out: Path
    results: tuple[ModelResult, ...]
    seconds: float


def train(config: TrainConfig, reporter: Reporter) -> TrainResult:
    """Trains a model as ``config`` says and records the checkpoint in the history.

    Raises:
        EqatError: what was asked for cannot be done.
        TrainingDivergedError: a loss became NaN or infinite.
    """
    plan = make_plan(config)
    wait_for_all()  # the others plan now, with what a model hub has put on disk
    wait_for_all()
    with WorkFolder(plan.work, restart=plan.config.restart) as work:
        try:
            return _Run(plan, work, reporter).run()
        except torch.OutOfMemoryError as error:
            raise _explain(error) from error
        except (KeyboardInterrupt, SystemExit):
            if work.worth_keeping:
                reporter.message(f"stopped; what is finished is kept in {work.path}: the same command goes on from it")
            raise


def _explain(error: EqatError | torch.OutOfMemoryError) -> EqatError:
    """The error for the user: what to do when the GPU's memory is too small, any other as it is."""
    if isinstance(error, EqatError):
        return error
    return InputError(
        "the GPU is out of memory; use a smaller --batch or --seq-len (Block-AP) or --e2e-micro-batch 1 (E2E-QP), "
        "--activations ram, or --device cpu"
    )


class _Run:
    def __init__(self, plan: TrainPlan, work: WorkFolder, shown: Reporter) -> None:
        self.started = time.perf_counter()
        self.plan, self.config, self.work = plan, plan.config, work
        self.shown, self.recorder = shown, EventRecorder(work.path / "events.jsonl")
        self.files = CompositeReporter(LogFileReporter(work.path / LOG_FILE), self.recorder)
        self.reporter = reporter = CompositeReporter(shown, self.files)
        self.device, dtype = compute_target(self.config)
        if (ranks := joined()) is not None:
            reporter.message(f"{ranks.size} ranks train together ({ranks.backend}); rank 0 measures and writes")
        for note in plan.notes:
            reporter.message(note)
        reporter.event("start", **asdict(plan.saved))
        tokenizer = load_tokenizer(plan.model, trust_remote_code=self.config.trust_remote_code)
        self.data: TrainingData = prepare_data(self.config, tokenizer, reporter)
        self.measurement = Measurement(
            windows=self.data.evaluation,
            tokenizer=tokenizer,
            prompt=self.data.prompt,
            sample_tokens=self.config.sample_tokens,
            seed=self.config.seed,
            device=self.device,
            dtype=dtype,
            trust_remote_code=self.config.trust_remote_code,
            whole=self._whole_model_bytes(),
            work=work.path,
            activations=self.config.activations,
        )
        self.rows = MeasuredRows(work.path / "measured.json", self._measured_with(dtype))
        self.results: list[ModelResult] = []

    def run(self) -> TrainResult:
        checkpoint = self.plan.model
        if self.config.stage == "e2e-qat":
            self.baselines()
            self.e2e_qat()
            return self.finish()
        if self.config.stage == "e2e-qp":
            self.measure("before", checkpoint)
        else:
            self.baselines()
            checkpoint = self.block_ap()
        if self.config.stage != "block-ap":
            self.e2e_qp(checkpoint)
        return self.finish()

    def measure(self, title: str, folder: Path) -> None:
        if not self.measurement.wanted:
            return
        row = self.rows.get(title)
        if row is None:
            row = self.measurement.measure(title, folder, self.reporter)
            self.rows.add(row)
        self.results.append(row)

    def _measured_with(self, dtype: torch.dtype) -> dict[str, Any]:
        windows = self.data.evaluation
        return {
            "text": None if windows is None else tensor_fingerprint(windows.input_ids, windows.labels),
            "prompt": self.data.prompt,
            "sample_tokens": self.config.sample_tokens,
            "seed": self.config.seed,
            "computed": f"{self.device.type} {dtype}",
            "model": str(self.plan.model.absolute()),
        }

    def _whole_model_bytes(self) -> int:
        """What measuring may take: on a GPU a share of what is free, else no more than training a block does."""
        if self.device.type == "cuda":
            return int(WHOLE_SHARE * torch.cuda.mem_get_info(self.device)[0])
        model = build_skeleton(self.plan.model, torch.float32, trust_remote_code=self.config.trust_remote_code)
        tokens = self.config.batch * (self.config.seq_len or 1)
        return max(WHOLE_BYTES, bytes_to_train(find_decoder_layers(model)[1], tokens))

    def baselines(self) -> None:
        """Measures the full-precision model and, unless that is the run's own result, round-to-nearest."""
        rounded = self.work.path / "round-to-nearest"
        wanted = (self.config.epochs > 0 or self.config.stage == "e2e-qat") and self.measurement.wanted
        self.measure("full precision", self.plan.model)
        if wanted and self.rows.get("round-to-nearest") is None:
            scratch = self.work.path / "rounding"
            settings = replace(block_ap_settings(self.config), epochs=0, start="minmax")
            self._run_block_ap(settings, rounded, Reporter(), scratch)
            self.measure("round-to-nearest", rounded)
            shutil.rmtree(rounded)
            shutil.rmtree(scratch, ignore_errors=True)
        elif wanted:
            self.measure("round-to-nearest", rounded)

    def block_ap(self) -> Path:
        """Trains block by block; returns the checkpoint, which is the output when no other stage follows."""
        last = self.config.stage == "block-ap"
        settings = block_ap_settings(self.config)
        out = self.plan.out if last else self.plan.keep_block_ap or self.work.path / "block-ap"
        with self.reporter.task("Block-AP", self.plan.blocks) as overall:
            self._run_block_ap(settings, out, StageReporter(self.reporter, overall, "block"), self.work.path)
        if last:
            self.record()
        self.measure("Block-AP" if settings.epochs else "round-to-nearest", out)
        return out

    def _run_block_ap(self, settings: BlockApSettings, out: Path, reporter: Reporter, work: Path) -> None:
        nothing = torch.empty(0, 2, dtype=torch.int64)
        train, validation = nothing, nothing
        if self.data.block_ap is not None:
            train, validation = (windows.input_ids for windows in self.data.block_ap)
        run_block_ap(
            self.plan.model,
            train,
            validation,
            settings,
            out,
            work_dir=work,
            reporter=reporter,
            shard_size=self.plan.shard_size,
            force=self.plan.force,
            trust_remote_code=self.config.trust_remote_code,
        )

    def e2e_qat(self) -> None:
        """Trains the whole quantized model at once, and writes the output."""
        if self.data.e2e is None:
            raise ValueError("no data was prepared for E2E-QAT")
        run_e2e_qat(
            self.plan.model,
            self.data.e2e,
            qat_settings(self.config),
            self.plan.out,
            val=self.data.e2e_validation,
            work_dir=self.work.path,
            reporter=self.reporter,
            shard_size=self.plan.shard_size,
            force=self.plan.force,
            trust_remote_code=self.config.trust_remote_code,
        )
        self.record()
        self.measure("E2E-QAT", self.plan.out)

    def e2e_qp(self, checkpoint: Path) -> None:
        """Trains the scales of a checkpoint end to end, and writes the output."""
        if self.data.e2e is None:
            raise ValueError("no data was prepared for E2E-QP")
        try:
            run_e2e_qp(
                checkpoint,
                self.data.e2e,
                e2e_settings(self.config),
                self.plan.out,
                val=self.data.e2e_validation,
                work_dir=self.work.path,
                reporter=self.reporter,
                shard_size=self.plan.shard_size,
                force=self.plan.force,
                trust_remote_code=self.config.trust_remote_code,
            )
        except (EqatError, torch.OutOfMemoryError) as error:
            failure = _explain(error)
            if checkpoint == self.plan.model:
                raise failure from error
            lower = " --lr-e2e LOWER" if isinstance(error, TrainingDivergedError) else ""
            raise type(failure)(
                f"{failure}; Block-AP's checkpoint is kept, go on with: eqat train {checkpoint} --stage e2e-qp{lower}"
            ) from error
        self.record()
        self.measure("E2E-QP", self.plan.out)

    def record(self) -> None:
        """Notes a finished checkpoint's settings in it, and the checkpoint in the history, before anything can fail."""
        file = self.work.path / CONFIG_FILE
        save_config(self.plan.saved, file)
        publish([file], self.plan.out)
        history.record("native", self.plan.out)

    def finish(self) -> TrainResult:
        seconds = time.perf_counter() - self.started
        rows = [asdict(result) for result in self.results]
        endings: list[tuple[str, dict[str, Any]]] = [("done", {"out": str(self.plan.out), "seconds": seconds})]
        if rows:
            endings.insert(0, ("summary", {"rows": rows, "prompt": self.data.prompt}))
        for kind, fields in endings:
            self.files.event(kind, **fields)
        report = self.work.path / REPORT_FILE
        write_report(
            report,
            demo=self.plan.demo,
            settings=asdict(self.plan.saved),
            device=self.device,
            seconds=seconds,
            results=rows,
            events=self.recorder.events,
        )
        publish([self.work.path / LOG_FILE, report], self.plan.out)
        for kind, fields in endings:  # last, because whoever reads standard output may be gone
            self.shown.event(kind, **fields)
        return TrainResult(self.plan.out, tuple(self.results), seconds)
