import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tuneloom.engine.base import TokenOutput
from tuneloom.engine.draw import draw_tokens
from tuneloom.engine.sampler import SamplingState, best_tokens, sample
from tuneloom.errors import TuneloomError
from tuneloom.generation import SamplingParams


@dataclass
class Row:
    params: SamplingParams
    sampling: SamplingState


def row(prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: object) -> Row:
    wanted = SamplingParams(**params)
    state = SamplingState(wanted, prompt)
    for token in output:
        state.record(token)
    return Row(wanted, state)


def token_ids(outputs: list[TokenOutput | TuneloomError]) -> list[int]:
    assert all(isinstance(output, TokenOutput) for output in outputs), outputs
    return [output.token_id for output in outputs]


def random_logits(rows: int, vocab: int = 600, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def plain_distribution(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Temperature, then top_k, then top_p, then min_p, as a textbook would: lists and sorting, nothing else.

    The kept tokens are in the order in which a draw passes them.
    """
    best = max(logits)
    weights = [math.exp((value - best) / params.temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: params.top_k or None]
    mass, kept = sum(weights[i] for i in order), []
    reached = 0.0
    for i in order:
        if reached >= params.top_p * mass and params.top_p < 1 and kept:
            break
        kept.append(i)
        reached += weights[i]
    kept = [i for i in kept if weights[i] >= params.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept if weights[i] > 0}


def plain_adjusted(
    logits: list[float], params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]
) -> list[float]:
    """Penalties and bias, token by token."""
    adjusted = list(logits)
    for i in {*prompt, *output}:
        r = params.repetition_penalty
        adjusted[i] = adjusted[i] * r if adjusted[i] < 0 else adjusted[i] / r
    for i, count in Counter(output).items():
        adjusted[i] -= params.presence_penalty + params.frequency_penalty * count
    for i, bias in params.logit_bias.items():
        adjusted[i] += bias
    return adjusted


def is_near_an_edge(distribution: dict[int, float], draw: float) -> bool:
    """Whether float32 may take the neighbour."""
    reached = 0.0
    for share in distribution.values():
        reached += share
        if abs(reached - draw) < 1e-5:
            return True
    return False


def looked_up(distribution: dict[int, float], draw: float) -> int:
    reached = 0.0
    for i, share in distribution.items():
        reached += share
        if draw < reached:
            return i
    return i


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 2.0, 30.0]),
        "top_p": st.sampled_from([0.001, 0.3, 0.6, 0.9, 0.999, 1.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, 64, 300, 5000, 10**9]),
        "min_p": st.sampled_from([0.0, 1e-4, 0.1, 0.7, 1.0]),
    }
)


@given(
    params=SETTINGS,
    vocab=st.sampled_from([1, 2, 3, 40, 255, 256, 257, 600, 5000]),
    seed=st.integers(0, 2**31),
    draw=st.floats(0, 1, exclude_max=True),
    ties=st.sampled_from([None, 0.5, 4.0]),
    num_forbidden=st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_a_number_means_the_same_token_as_in_a_plain_implementation(params, vocab, seed, draw, ties, num_forbidden):
    logits = random_logits(1, vocab, seed=seed)
    if ties is not None:
        logits = (logits / ties).round() * ties
    logits[0, 1 : 1 + num_forbidden] = float("-inf")
    wanted = SamplingParams(**params)
    expected = plain_distribution(logits[0].tolist(), wanted)
    assume(not is_near_an_edge(expected, draw))
    # An edge of top_p or min_p itself may fall on either side as well.
    softer = [
        SamplingParams(**{**params, "top_p": min(1.0, wanted.top_p * f), "min_p": wanted.min_p * f})
        for f in (1 - 1e-5, 1 + 1e-5)
    ]
    assume(all(plain_distribution(logits[0].tolist(), each).keys() == expected.keys() for each in softer))
    assert draw_tokens(logits, logits.amax(-1), [wanted], [draw]) == [looked_up(expected, draw)]


@given(
    penalties=st.fixed_dictionaries(
        {
            "presence_penalty": st.sampled_from([0.0, 0.7, -2.0]),
            "frequency_penalty": st.sampled_from([0.0, 0.4, -1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
            "logit_bias": st.dictionaries(st.integers(0, 39), st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=4),
        }
    ),
    prompt=st.lists(st.integers(0, 39), max_size=30).map(tuple),
    output=st.lists(st.integers(0, 39), max_size=90).map(tuple),
    seed=st.integers(0, 2**31),
    place=st.integers(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_penalties_and_bias_choose_as_the_plain_formula_beside_other_rows(penalties, prompt, output, seed, place):
    logits = random_logits(3, 40, seed=seed)
    rows = [row((1, 2), (2, 3, 3), temperature=0.0, frequency_penalty=0.3, logit_bias={4: 9.0}), row(temperature=0.0)]
    rows.insert(place, row(prompt, output, temperature=0.0, **penalties))
    expected = plain_adjusted(logits[place].tolist(), rows[place].params, prompt, output)
    first, second = sorted(expected, reverse=True)[:2]
    assume(first - second > 1e-4)
    assert token_ids(sample(logits, rows))[place] == expected.index(first)


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
        token for _ in range(count // 100) for token in token_ids(sample(logits.expand(100, -1), [sampler] * 100))
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
    assert token_ids(sample(logits, [row(temperature=0.0), row(top_k=1)])) == logits.argmax(-1).tolist()


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
    assert isinstance(tokens[1], TuneloomError) and tokens[1].code == "model_error"
    clean = sample(random_logits(3), [row(temperature=temperature, seed=1, logprobs=2) for _ in range(3)])
    assert (tokens[0], tokens[2]) == (clean[0], clean[2])


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((1, 600), float("-inf"))
    logits[0, 3] = 0.0
    assert all(sample(logits, [row(temperature=t)])[0].token_id == 3 for t in (0.0, 0.1, 1.0, 5.0))


def test_a_vocabulary_smaller_than_the_candidates_is_sampled_whole():
    logits = torch.zeros(200, 3)
    assert set(token_ids(sample(logits, [row()] * 200))) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 256, 600, 1024])
def test_the_best_token_is_the_first_of_the_largest(dtype: torch.dtype, vocab: int):
    logits = random_logits(20, vocab).to(dtype)
    logits[:10] = logits[:10].round()
    best, place = best_tokens(logits)
    assert [logits[i].tolist().index(logits[i].max().item()) for i in range(20)] == place.tolist()
    assert best.tolist() == logits.amax(-1).tolist()
    logits[3, vocab // 2] = float("nan")
    assert best_tokens(logits)[0].isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("params", [{"temperature": 1e-5}, {"temperature": 1e-45}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_narrowest_settings_are_greedy(params: dict[str, float]):
    logits = (random_logits(8) * 100).bfloat16()
    assert token_ids(sample(logits, [row(**params) for _ in range(8)])) == best_tokens(logits)[1].tolist()


def test_a_bias_of_100_decides_and_one_of_minus_100_forbids():
    logits = random_logits(2)
    best = int(logits[0].argmax())
    rows = [row(logit_bias={best: -100.0}, temperature=2.0), row(logit_bias={5: 100.0}, temperature=2.0)]
    for _ in range(50):
        first, second = token_ids(sample(logits, rows))
        assert first != best and second == 5


def test_sampling_leaves_the_logits_as_they_are():
    logits = random_logits(2)
    before = logits.clone()
    sample(logits, [row(prompt=(1, 2), repetition_penalty=2.0, logit_bias={3: 5.0}), row(temperature=2.0)])
    assert torch.equal(logits, before)


def test_the_same_alternatives_are_named_however_many_others_ask_for():
    logits = random_logits(2).round()
    alone = sample(logits[:1], [row(temperature=0.0, logprobs=3)])[0]
    assert sample(logits, [row(temperature=0.0, logprobs=3), row(temperature=0.0, logprobs=20)])[0].top == alone.top


def test_every_seed_draws_its_own_numbers():
    seeds = [0, 1, -1, 1 << 32, 1 << 62, (1 << 63) - 129, -(1 << 63), 1 - (1 << 63), (1 << 32) + 1]
    draws = {seed: [SamplingState(SamplingParams(seed=seed), ()).draw() for _ in range(2)] for seed in seeds}
    assert all(first == again for first, again in draws.values())
    assert len({first for first, _ in draws.values()}) == len(seeds)
    assert SamplingState(SamplingParams(), ()).draw() != SamplingState(SamplingParams(), ()).draw()
