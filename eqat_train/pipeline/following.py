"""``eqat train`` on every rank but the first: takes part in what rank 0 trains, and leaves no checkpoint.

Each rank reads the model and the data by itself. Rank 0 says which stage begins, and where its unfinished run stands;
of a state that ranks share each writes its share there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from formats.errors import InputError

from ..block_ap.following import follow_block_ap
from ..e2e_qat.following import follow_e2e_qat
from ..e2e_qp.following import follow_e2e_qp
from ..models.loading import load_tokenizer
from ..options import TrainConfig
from ..ranks.group import joined
from ..ranks.orders import orders, wait_for_all
from ..reporting.progress import Reporter
from ..resume.identity import tensor_fingerprint
from .plan import TrainPlan, make_plan
from .stage_settings import block_ap_settings, e2e_settings, qat_settings
from .training_data import TrainingData, prepare_data

__all__ = ["follow"]


def follow(config: TrainConfig) -> None:
    """Takes part until rank 0 has finished.

    Raises:
        EqatError: what was asked for cannot be done on this rank.
        TrainingDivergedError: a loss became NaN or infinite.
    """
    wait_for_all()  # rank 0 has a plan, and what a model hub has for it is on disk
    plan = make_plan(config)
    wait_for_all()
    data: TrainingData | None = None
    for order in orders():
        if data is None:  # rank 0 has tokenized it by now
            tokenizer = load_tokenizer(plan.model, trust_remote_code=plan.config.trust_remote_code)
            data = prepare_data(plan.config, tokenizer, Reporter())
        _STAGES[order["order"]](plan, data, order)


def _block_ap(plan: TrainPlan, data: TrainingData, order: dict[str, Any]) -> None:
    if data.block_ap is None:
        raise ValueError("no data was prepared for Block-AP")
    train, validation = (windows.input_ids for windows in data.block_ap)
    _check_windows("Block-AP", order["windows"], train, validation)
    follow_block_ap(
        plan.model,
        train,
        validation,
        block_ap_settings(plan.config),
        Path(order["blocks"]),
        order["finished"],
        trust_remote_code=plan.config.trust_remote_code,
    )


def _e2e_qp(plan: TrainPlan, data: TrainingData, order: dict[str, Any]) -> None:
    if data.e2e is None:
        raise ValueError("no data was prepared for E2E-QP")
    _check_windows("E2E-QP", order["windows"], data.e2e.input_ids, data.e2e.labels)
    follow_e2e_qp(
        Path(order["checkpoint"]),
        data.e2e,
        data.e2e_validation,
        e2e_settings(plan.config),
        Path(order["state"]),
        trust_remote_code=plan.config.trust_remote_code,
    )


def _e2e_qat(plan: TrainPlan, data: TrainingData, order: dict[str, Any]) -> None:
    if data.e2e is None:
        raise ValueError("no data was prepared for E2E-QAT")
    _check_windows("E2E-QAT", order["windows"], data.e2e.input_ids, data.e2e.labels)
    follow_e2e_qat(
        plan.model,
        data.e2e,
        data.e2e_validation,
        qat_settings(plan.config),
        Path(order["state"]),
        trust_remote_code=plan.config.trust_remote_code,
    )


_STAGES = {"block-ap": _block_ap, "e2e-qat": _e2e_qat, "e2e-qp": _e2e_qp}


def _check_windows(stage: str, expected: str, *windows: Tensor) -> None:
    ranks = joined()
    if tensor_fingerprint(*windows) != expected:
        raise InputError(
            f"rank {ranks.rank if ranks else 0} reads other training windows for {stage} than rank 0; --data and the "
            "model's tokenizer have to be the same files on every machine"
        )
