"""The script that trains the second model: it learns, repeats with its seed, and stops when told to."""

import torch

from benchmarks.recipes.second_model import build, learning_rate, train_


def trained(seed: int = 0, limit: int | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build(vocabulary=32, end=0, hidden=128, layers=1, seed=seed)
    windows = torch.arange(16)[:, None].add(torch.arange(16)) % 32  # each token follows from the one before
    losses = train_(model, windows, epochs=12, batch=4, peak=3e-3, seed=seed, limit=limit)
    return losses, model.state_dict()


def test_it_learns_and_repeats_with_its_seed() -> None:
    losses, weights = trained()
    assert len(losses) == 48 and losses[-1] < 0.5 * losses[0]
    again, same = trained()
    assert again == losses and all(torch.equal(same[name], weights[name]) for name in weights)
    assert trained(seed=1)[0] != losses


def test_it_learns_from_a_teacher_what_the_teacher_predicts() -> None:
    teacher = build(vocabulary=32, end=0, hidden=128, layers=1, seed=3)
    with torch.no_grad():
        teacher.model.embed_tokens.weight.mul_(20)  # predictions that differ from each other
    model = build(vocabulary=32, end=0, hidden=128, layers=1)
    windows = torch.randint(0, 32, (16, 16), generator=torch.Generator().manual_seed(0))
    losses = train_(model, windows, epochs=12, batch=4, peak=3e-3, teacher=teacher)
    with torch.no_grad():
        log_p, log_q = (m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (teacher, model))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert divergence < 0.5 * losses[0] and abs(divergence - losses[-1]) < 0.3 * losses[-1]


def test_a_limit_shortens_the_run_and_keeps_its_schedule() -> None:
    assert trained(limit=6)[0] == trained()[0][:6]


def test_it_is_another_architecture_whose_linears_groups_of_128_divide() -> None:
    model = build(vocabulary=64, end=0, layers=1)
    assert model.config.model_type == "qwen3" and model.lm_head.weight is model.model.embed_tokens.weight
    linears = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(linears) == 7 and all(linear.in_features % 128 == 0 for linear in linears)


def test_the_learning_rate_rises_and_falls_to_a_hundredth() -> None:
    rates = [learning_rate(step, 100, 1.0) for step in range(101)]
    assert rates[4] == max(rates) == 1.0 and rates[0] == 0.2 and abs(rates[100] - 0.01) < 1e-12
    assert rates[4:] == sorted(rates[4:], reverse=True)
