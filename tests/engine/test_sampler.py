import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloom.engine.sampler import SamplingState, sample
from tuneloom.generation import SamplingParams

CPU = torch.device("cpu")


@dataclass
class Row:
    params: SamplingParams
    sampling: SamplingState


def row(vocab: int = 600, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: object) -> Row:
    wanted = SamplingParams(**params)
    state = SamplingState.create(wanted, prompt, vocab, CPU)
    for token in output:
        state.record(token)
    return Row(wanted, state)


def random_logits(rows: int, vocab: int = 600, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def plain_distribution(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Temperature, then top_k, then top_p, then min_p, as a textbook would: lists and sorting, nothing else."""
    best = max(logits)
    weights = [math.exp((value - best) / params.temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[: params.top_k or None]
    mass, kept = sum(weights[i] for i in order), []
    reached = 0.0
    for i in order:
        if reached >= params.top_p * mass:
            break
        kept.append(i)
        reached += weights[i]
    kept = [i for i in kept if weights[i] >= params.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05},
        {"temperature": 3.0},
        {"temperature": 3.0, "top_p": 0.97},
        {"temperature": 3.0, "top_k": 400},
        {"temperature": 5.0, "min_p": 0.001},
    ],
)
def test_samples_follow_the_plain_distribution(params: dict[str, float]):
    """The flat ones need more of the vocabulary than the candidates that are looked at first."""
    logits = random_logits(1, spread=1.5)
    count = 4000
    sampler = row(seed=1, **params)
    drawn = Counter(
        token.token_id
        for _ in range(count // 100)
        for token in sample(logits.expand(100, -1), [sampler] * 100)
        if token is not None
    )
    expected = plain_distribution(logits[0].tolist(), sampler.params)
    assert set(drawn) <= set(expected)
    distance = sum(abs(drawn[i] / count - p) for i, p in expected.items()) / 2
    # The expected distance of an honest sample of this size.
    noise = sum(math.sqrt(2 * p * (1 - p) / (math.pi * count)) for p in expected.values()) / 2
    assert distance < 1.35 * noise + 0.005


@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    top_p=st.sampled_from([0.3, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 7, 300]),
    min_p=st.sampled_from([0.0, 0.1]),
    place=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_a_row_draws_the_same_whatever_is_beside_it(seed, temperature, top_p, top_k, min_p, place):
    params = {"seed": seed, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    logits = random_logits(7, seed=seed % 1000)
    alone = sample(logits[place : place + 1], [row(**params)])[0]
    rows = [row(temperature=0.3 * i, top_k=i) for i in range(7)]
    rows[place] = row(**params)
    assert sample(logits, rows)[place] == alone


def test_temperature_zero_takes_the_best_and_so_does_top_k_one():
    logits = random_logits(2)
    tokens = sample(logits, [row(temperature=0.0), row(top_k=1)])
    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


def test_penalties_and_bias_equal_the_plain_formula():
    logits = random_logits(1, vocab=50)
    params = {
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.3,
        "logit_bias": {7: 5.0, 8: -100.0},
    }
    prompt, output = (1, 2, 3), (3, 4, 4, 8)
    state = row(vocab=50, prompt=prompt, output=output, temperature=0.0, **params)
    expected = logits[0].tolist()
    for i in {*prompt, *output}:
        expected[i] = expected[i] * 1.3 if expected[i] < 0 else expected[i] / 1.3
    for i, count in Counter(output).items():
        expected[i] -= 0.7 + 0.4 * count
    expected[7] += 5
    expected[8] -= 100
    found = state.sampling.adjust(logits[0], state.params)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert sample(logits, [state])[0].token_id == max(range(50), key=expected.__getitem__)


def test_logprobs_come_from_the_raw_logits_only_for_those_who_ask():
    logits = random_logits(2)
    asked, other = sample(logits, [row(seed=3, logprobs=4, temperature=2.0, logit_bias={5: 3.0}), row(seed=3)])
    expected = logits[0].log_softmax(-1)
    assert asked.logprob == pytest.approx(expected[asked.token_id].item(), abs=1e-5)
    assert [id for id, _ in asked.top] == expected.topk(4).indices.tolist()
    assert other.logprob is None and other.top == ()
    chosen_only = sample(logits[:1], [row(logprobs=0)])[0]
    assert chosen_only.logprob is not None and chosen_only.top == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_number_gives_none_and_spares_the_others(value: float, temperature: float):
    logits = random_logits(3)
    logits[1, 17] = value
    tokens = sample(logits, [row(temperature=temperature, seed=1, logprobs=2) for _ in range(3)])
    assert tokens[1] is None
    clean = sample(random_logits(3), [row(temperature=temperature, seed=1, logprobs=2) for _ in range(3)])
    assert (tokens[0], tokens[2]) == (clean[0], clean[2])


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((1, 600), float("-inf"))
    logits[0, 3] = 0.0
    assert all(sample(logits, [row(temperature=t)])[0].token_id == 3 for t in (0.0, 0.1, 1.0, 5.0))


def test_a_vocabulary_smaller_than_the_candidates_is_sampled_whole():
    logits = torch.zeros(200, 3)
    drawn = {token.token_id for token in sample(logits, [row(vocab=3)] * 200) if token}
    assert drawn == {0, 1, 2}
