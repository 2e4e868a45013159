"""A small network that drafts: natively as in torch, lossless whatever it says, and it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import gateskip
from compose.artifacts.folder import copy_companions
from compose.bench.speed.measure import held_bytes
from compose.errors import RuleBroken, UserError
from compose.stages.registry import (
    DataSpec,
    DraftNetwork,
    Int4,
    PackHead,
    Speculate,
    Stage,
    StageJob,
)
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.draft_models import LearnedDraft
from gateskip.decoding.sampling import Sampler
from gateskip.decoding.speculation import Drafting
from gateskip.errors import FormatError
from gateskip.kernels import ops
from gateskip.model.draft_network import NETWORK_FILE, frequent, load_network, save_network
from gateskip.model.draft_network import DraftNetwork as Network
from gateskip.runtime.backend import (
    DraftLimit,
    Round,
    SampledTokens,
    SampleRequest,
    SpeculationRequest,
    Verified,
)
from gateskip.runtime.skipping import SkippingModel
from gateskip.training.draft_network import DraftConfig, train_draft_network

native = pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
ALL = DraftLimit(0.0, [1.0])  # draft on, whatever it is


def random_network(hidden: int, tokens: int = 100, seed: int = 0) -> Network:
    """One that says something else after every token, of every third token of 512."""
    torch.manual_seed(seed)
    network = Network(hidden, 48, torch.arange(tokens) * 3 + 1).requires_grad_(False)
    for part in network.parameters():
        part.add_(0.3 * torch.randn(part.shape))
    return network


def decoders(folder: Path, **loads: Any) -> tuple[Decoder, Decoder]:
    """One folder in torch and natively."""
    return (
        gateskip.load(folder, backend="gathered", **loads),
        gateskip.load(folder, backend="native", **loads),
    )


@pytest.fixture
def with_network(make_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model whose folder has a network."""
    folder = make_tiny("llama")
    own = tmp_path / "model"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).symlink_to(file)
    hidden = gateskip.load(own).skipping.model.config.hidden_size
    save_network(own, random_network(hidden), torch.float32)
    return own


@native
def test_a_network_is_made_ready_without_a_copy_of_the_model(with_network: Path) -> None:
    decoder = gateskip.load(with_network)
    before = held_bytes(decoder.tensors())
    decoder.prepare_drafts("learned")
    assert len(decoder.models()) == 1
    assert held_bytes(decoder.tensors()) > before, "the kernels' copy of the network"
    with pytest.raises(ValueError, match="prepare_drafts"):
        decoder.drafter("learned")


@native
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("size", [40, 64])
def test_natively_as_in_torch(make_tiny: Callable[..., Path], family: str, size: int) -> None:
    """Exactly where columns are no whole blocks; else as near as 4 and 8 bits are."""
    sizes = {"hidden_size": size, "head_dim": 16}
    slow, fast = decoders(make_tiny(family, **sizes), dtype="float32")
    network = random_network(size)
    drafts = [LearnedDraft(each.skipping, network) for each in (slow, fast)]
    same = 0
    for seed in range(12):
        state = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        wanted, found = (each.draft(SampleRequest(7, 5, limit=ALL), state) for each in drafts)
        if size == 40:
            assert found.tokens == wanted.tokens
            assert found.probabilities == pytest.approx(wanted.probabilities, rel=1e-4)
        same += found.tokens[0] == wanted.tokens[0]
        assert all(token % 3 == 1 for token in found.tokens)
    assert same >= 10, "of 12 first tokens, two may be as good as others"


@native
def test_an_unlikely_draft_ends(make_tiny: Callable[..., Path]) -> None:
    _, fast = decoders(make_tiny("llama"), dtype="float32")
    size = fast.skipping.model.config.hidden_size
    slow = LearnedDraft(decoders(make_tiny("llama"))[0].skipping, random_network(size))
    for draft in (slow, LearnedDraft(fast.skipping, random_network(size))):
        found = draft.draft(SampleRequest(7, 8, limit=DraftLimit(0.3, [0.6])), torch.ones(size))
        assert len(found.tokens) == 3  # 0.6 to the third is less than 0.3


@native
def test_drawn_drafts_come_with_what_they_were_drawn_from(make_tiny: Callable[..., Path]) -> None:
    _, fast = decoders(make_tiny("llama", hidden_size=40, head_dim=16), dtype="float32")
    draft, sampler = LearnedDraft(fast.skipping, random_network(40)), Sampler(temperature=1.0)
    assert sampler.draws is not None
    counts = torch.zeros(512)
    for i in range(400):
        request = SampleRequest(7, 2, sampler.draws, [(i + 0.5) / 400, 0.5], ALL)
        found = draft.draft(request, torch.ones(40))
        assert float(found.drawn_from[0].sum()) == pytest.approx(1, abs=1e-5)  # type: ignore[union-attr]
        assert found.probabilities[0] == pytest.approx(
            float(found.drawn_from[0][found.tokens[0]])  # type: ignore[index]
        )
        counts[found.tokens[0]] += 1
    torch.testing.assert_close(counts / 400, found.drawn_from[0], atol=1.01 / 400, rtol=0)


@pytest.mark.parametrize("backend", ["gathered", pytest.param("native", marks=native)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", ["auto", 3])
def test_text_is_that_of_plain_decoding(
    with_network: Path, backend: Any, rows: int, length: Any
) -> None:
    decoder = gateskip.load(with_network, dtype="float32", backend=backend)
    prompts = [[5 + row, 9, 13, 17 + row] for row in range(rows)]
    plain = decoder.generate(prompts, 40)
    drafted = decoder.generate(
        prompts, 40, "speculate", draft_weights="learned", draft_length=length, lookup=False
    )
    assert drafted.tokens == plain.tokens
    assert drafted.stats.draft_weights == "learned"
    assert length == "auto" or drafted.stats.drafted > 40


@native
def test_a_network_drafts_on_from_each_rounds_state(
    with_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds in one call have the drafts and the states that rounds of a call each have."""
    decoder, speculate = gateskip.load(with_network, dtype="float32"), SkippingModel.speculate
    calls: list[list[Verified]] = []

    def watched(
        model: SkippingModel, asked: SpeculationRequest, *others: Any
    ) -> tuple[list[Round], Any]:
        assert int(model.head(asked.state.unsqueeze(0)).argmax()) == asked.token
        made, state = speculate(model, asked, *others)
        calls.append([each.rows[0] for each in made])
        return made, state

    monkeypatch.setattr(SkippingModel, "speculate", watched)
    settings: dict[str, Any] = {"draft_weights": "learned", "draft_length": 4, "lookup": True}
    whole = decoder.generate([[5, 9, 13]], 120, "speculate", **settings)
    together = [each for call in calls for each in call]
    few = len(calls)
    calls.clear()
    monkeypatch.setattr("gateskip.decoding.speculation.MAX_ROUNDS", 1)
    assert decoder.generate([[5, 9, 13]], 120, "speculate", **settings).tokens == whole.tokens
    assert [each for (each,) in calls] == together and len(calls) > 5 * few
    assert any(each.accepted for each in together) and any(each.probabilities for each in together)


def test_a_call_ends_after_so_many_drafts(
    with_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds in which a text proposes nothing go on in one call; those with a draft are counted."""
    decoder, speculate = gateskip.load(with_network, dtype="float32"), SkippingModel.speculate
    calls: list[list[bool]] = []
    most = 32

    def watched(
        model: SkippingModel, asked: SpeculationRequest, *others: Any
    ) -> tuple[list[Round], Any]:
        made, state = speculate(model, asked, *others)
        calls.append([row.drafted > 0 for each in made for row in each.rows * each.steps])
        return made, state

    monkeypatch.setattr(SkippingModel, "speculate", watched)
    monkeypatch.setattr(Drafting, "lengths", lambda drafting: (0, 4, 32, most))
    settings: dict[str, Any] = {"draft_weights": "own", "draft_length": 4, "lookup": True}
    whole = decoder.generate([[5, 9, 13]], 120, "speculate", **settings)
    drafted = [each for call in calls for each in call]
    assert sum(drafted) > 4 and not all(drafted)
    calls.clear()
    most = 2
    assert decoder.generate([[5, 9, 13]], 120, "speculate", **settings).tokens == whole.tokens
    assert [each for call in calls for each in call] == drafted
    assert all(sum(call) == 2 and call[-1] for call in calls[:-1] if len(call) < 32)
    assert any(len(call) < 32 for call in calls[:-1])


def test_a_network_is_given_the_state_before_the_last_token(
    with_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a prompt, after plain steps, and after drafts that were accepted in part."""
    decoder = gateskip.load(with_network, dtype="float32", backend="gathered")
    plain = decoder.generate([[5, 9, 13]], 30).tokens[0]
    asked = 0

    def draft(request: SampleRequest, state: torch.Tensor) -> SampledTokens:
        nonlocal asked
        said = int(decoder.skipping.head(state.unsqueeze(0)).argmax())
        assert said == request.token, "the state before a token is the one that says it"
        asked += 1
        at = next(i for i in range(asked - 1, 30) if plain[i] == request.token)
        known = plain[at + 1 : at + 1 + request.count]
        return SampledTokens(known, None, [0.5] * len(known), known)

    assert decoder.network is not None
    monkeypatch.setattr(decoder.network, "draft", draft)
    drafted = decoder.generate(
        [[5, 9, 13]], 30, "speculate", draft_weights="learned", draft_length=4, lookup=False
    )
    assert drafted.tokens[0] == plain and asked > 2


def test_sampled_text_is_a_texts_of_the_model(with_network: Path) -> None:
    """Every sampler, also one that only transformers knows."""
    decoder = gateskip.load(with_network, dtype="float32")
    for sampler in (Sampler(temperature=1.0), Sampler(temperature=1.0, repetition_penalty=1.2)):
        found = decoder.generate(
            [[5, 9, 13]],
            25,
            "speculate",
            draft_weights="learned",
            draft_length=2,
            lookup=False,
            sampler=sampler,
        )
        assert len(found.tokens[0]) == 25 and found.stats.drafted > 0


def test_without_a_network_it_is_refused(make_tiny: Callable[..., Path]) -> None:
    decoder = gateskip.load(make_tiny("llama"))
    with pytest.raises(ValueError, match="no draft network: the stage draft-network trains one"):
        decoder.generate([[5]], 3, "speculate", draft_weights="learned")


def test_a_network_is_written_and_read(tmp_path: Path) -> None:
    network = random_network(32)
    save_network(tmp_path, network, torch.float32)
    again = load_network(tmp_path, 32, 512)
    assert again is not None and all(
        torch.equal(a, b)
        for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert load_network(tmp_path / "nowhere", 32, 512) is None
    for hidden, vocabulary in ((40, 512), (32, 200)):
        with pytest.raises(FormatError, match=NETWORK_FILE):
            load_network(tmp_path, hidden, vocabulary)
    whole = (tmp_path / NETWORK_FILE).read_bytes()
    (tmp_path / NETWORK_FILE).write_bytes(whole[:-9])
    with pytest.raises(FormatError, match="holds no draft network"):
        load_network(tmp_path, 32, 512)


def test_it_learns_what_the_model_says(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Loss falls, a killed training ends in the same numbers, and frequent tokens are its own."""
    skipping = gateskip.load(make_tiny("llama"), dtype="float32", backend="gathered").skipping
    model = skipping.model
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(3, 120, (24, 32), generator=generator)
    tokens = frequent(blocks, 64, 512)
    assert len(tokens) == 64 and bool((tokens < 120).all())

    def trained(steps: int, work: Path | None = None) -> tuple[Network, list[Any]]:
        torch.manual_seed(1)
        network = Network(model.config.hidden_size, 48, tokens)
        config = DraftConfig(
            steps=steps, batch=4, precision="no", checkpoint_every=10, decay="linear"
        )
        return network, train_draft_network(skipping, network, blocks, config, work)

    whole, curve = trained(30)
    first, last = (sum(row["loss"] for row in part) for part in (curve[:5], curve[-5:]))
    assert last < 0.8 * first

    class Killed(Exception):
        pass

    def kill(done: int, total: int, phase: str, **numbers: Any) -> None:
        if phase == "training" and done == 21:
            raise Killed

    torch.manual_seed(1)
    network = Network(model.config.hidden_size, 48, tokens)
    config = DraftConfig(steps=30, batch=4, precision="no", checkpoint_every=10)
    with pytest.raises(Killed):
        train_draft_network(skipping, network, blocks, config, tmp_path, kill)
    again, resumed = trained(30, tmp_path)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in curve]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# -- the stage


STAGE: dict[str, Any] = {"steps": 4, "batch": 2, "inner": 32, "vocabulary": 128, "precision": "no"}


def test_the_stage_puts_a_network_beside_the_weights(
    licence_text: Path,
    tiny_llama: Path,
    make_job: Callable[..., StageJob],
    tmp_path: Path,
) -> None:
    spec = DataSpec(source=str(licence_text), limit=40, length=32)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    stage = DraftNetwork(**STAGE)
    record = stage.run(make_job(tiny_llama, first, train=spec, dense=tiny_llama))
    assert len(record["training"]) == 4 and record["train_tokens"] == 4 * 2 * 32
    assert len(record["agreement"]) == 3 and 0 < record["covered"] <= 1
    again = DraftNetwork(init=str(first / NETWORK_FILE), steps=0)
    again = DraftNetwork.model_validate(again.model_dump())  # as a worker reads it
    copied = again.run(make_job(tiny_llama, second, train=spec, dense=tiny_llama))
    assert copied == {"parameters": record["parameters"]}
    for name in (NETWORK_FILE, "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    decoder = gateskip.load(second)
    plain = decoder.generate([[5, 9]], 20).tokens
    assert decoder.generate([[5, 9]], 20, "speculate", draft_weights="learned").tokens == plain


@native
@pytest.mark.parametrize("embedding", [8, 6, None])
def test_a_packed_model_is_drafted_for(
    licence_text: Path,
    tiny_llama: Path,
    make_job: Callable[..., StageJob],
    tmp_path: Path,
    embedding: Any,
) -> None:
    """The network learns from what the packed model says, whose embedding and LM head it shares."""
    spec = DataSpec(source=str(licence_text), limit=40, length=32)
    packed, made = tmp_path / "packed", tmp_path / "made"
    for stage, source, target in (
        (Int4(compensate=False, embedding=embedding), tiny_llama, packed),
        (DraftNetwork(**STAGE), packed, made),
    ):
        target.mkdir()
        texts = {"train": spec, "calibration": spec}
        stage.run(make_job(source, target, dense=tiny_llama, **texts))
        copy_companions(source, target)
    for backend in ("native", "gathered"):
        decoder = gateskip.load(made, backend=backend)  # type: ignore[arg-type]
        plain = decoder.generate([[5, 9]], 24).tokens
        drafted = decoder.generate(
            [[5, 9]], 24, "speculate", draft_weights="learned", draft_length=2, lookup=False
        )
        assert drafted.tokens == plain and drafted.stats.drafted > 0


def test_a_network_of_another_model_is_refused(
    tiny_llama: Path, make_job: Callable[..., StageJob], tmp_path: Path
) -> None:
    save_network(tmp_path, random_network(24), torch.float32)
    stage = DraftNetwork(init=str(tmp_path / NETWORK_FILE), steps=0)
    with pytest.raises(UserError, match="holds no draft network of this model"):
        stage.run(make_job(tiny_llama, tmp_path / "made", dense=tiny_llama))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "name a trained network with init"),
        ({"init": "a.safetensors", "inner": 8}, "the network that init names sets"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DraftNetwork(**given)


def test_drafts_of_a_network_skip_nothing() -> None:
    assert Speculate(draft_weights="learned").draft_budget == 1
    with pytest.raises(ValidationError, match="leave draft_budget out"):
        Speculate(draft_weights="learned", draft_budget=0.5)


@pytest.mark.parametrize(
    ("before", "stage", "rule"),
    [
        ((), Speculate(draft_weights="learned"), "learned-needs-network"),
        ((Int4(), DraftNetwork()), Speculate(draft_weights="learned"), None),
        ((DraftNetwork(),), Int4(), "draft-last"),
        ((DraftNetwork(),), DraftNetwork(), "two-networks"),
        ((DraftNetwork(),), PackHead(), "draft-last"),
    ],
)
def test_where_it_may_stand(before: tuple[Stage, ...], stage: Stage, rule: str | None) -> None:
    broken = None
    try:
        stage.check(None, before)
    except RuleBroken as error:
        broken = error.rule
    assert broken == rule
