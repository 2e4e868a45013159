"""Packed weights of 2, 3, 4, 6 and 8 bits against float64, alone and in a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from random_grids import MIXED, on_grids, random_grid
from torch import Tensor

from gateskip.kernels import abi, ops
from gateskip.kernels.abi import Kind, PrefillUnits
from gateskip.model.projections import Rows
from gateskip.quantization import packed_linear
from gateskip.quantization.folders import load_model
from gateskip.quantization.grid import Lines
from gateskip.quantization.packed_linear import (
    PackedLinear,
    accelerate_linears,
    rounding,
    streaming,
)
from gateskip.quantization.rounding import round_to_grid
from gateskip.runtime import native, native_prefill
from gateskip.runtime.backend import DraftLimit, SampleRequest
from gateskip.runtime.engine import Engine
from gateskip.runtime.skipping import SkippingModel

BLOCK = 32
pytestmark = [
    pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here"),
    pytest.mark.usefixtures("no_gradients"),
]
every_grid = pytest.mark.parametrize(
    ("bits", "group", "offset"),
    [
        (bits, group, offset)
        for bits in (2, 3, 4, 6, 8)
        for group in (32, 64, 128)
        for offset in (False, True)
    ],
)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(rows: int, k: int = 384) -> Tensor:
    """Every third row has a value that stands out."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
    x[::3, 37] = 60
    return x


def to_8_bits(x: Tensor) -> Tensor:
    """Activations as the kernels round them, in blocks of 32, and to 16 bits where a block's
    largest is more than eight times its row's root mean square; float64."""
    blocks = x.unflatten(1, (-1, BLOCK))
    most = blocks.abs().amax(2, keepdim=True)
    steps = most / 127
    codes = (blocks * (127 / most)).round()
    finer = ((blocks - codes * steps) * (254 * 127 / most)).round()
    stands_out = most > 8 * x.square().mean(1).sqrt().view(-1, 1, 1)
    parts = codes.double() + torch.where(stands_out, finer, 0).double() / 254
    return (parts * steps.double()).flatten(1)


@pytest.fixture(scope="module")
def engines(tiny_llama: Path) -> dict[bool, Engine]:
    """Native engines that keep activations in float32, and that round them to 8 bits."""
    model = load_model(tiny_llama, "float32")
    attention = model.model.layers[0].self_attn
    attention.q_proj = PackedLinear.of(
        round_to_grid(attention.q_proj.weight.detach(), torch.ones(64))
    )
    return {rounded: Engine(model, None, rounded=rounded) for rounded in (False, True)}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@every_grid
def test_unpacked_weights_are_the_grids(bits: int, group: int, offset: bool) -> None:
    grid = random_grid(bits, group, offset)
    layer = PackedLinear.of(grid)
    assert torch.equal(layer.unpacked(), grid.weight())
    assert layer.codes.numel() == 48 * 384 * bits // 8, "three tiles, no bit unused"


@every_grid
def test_weights_are_rounded_to_bfloat16_as_torch_does(bits: int, group: int, offset: bool) -> None:
    layer = PackedLinear.of(random_grid(bits, group, offset))
    assert torch.equal(layer.unpacked(torch.bfloat16), layer.unpacked().bfloat16())


def prompt_layer(bits: int, group: int, offset: bool, n: int = 41) -> PackedLinear:
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n))
    return PackedLinear.of(random_grid(bits, group, offset, n), bias)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in bfloat16 go through our kernel, whatever the stopwatch says here."""
    if ops.prefill_units() == PrefillUnits.NO_UNITS:
        pytest.skip("torch multiplies prompts here")
    for module in (packed_linear, native_prefill):
        monkeypatch.setattr(module, "bfloat16_is_faster", lambda: True)


@pytest.fixture
def in_bytes(prompts: None) -> None:
    """They meet activations of 8 bits."""
    if ops.prefill_units() != PrefillUnits.VECTORS:
        pytest.skip("units for whole matrices multiply bfloat16 here")


@every_grid
def test_a_prompts_product_is_that_of_weights_in_bfloat16(
    prompts: None, bits: int, group: int, offset: bool, threads: int
) -> None:
    """But for the order of sums and the last rounding; a row has the same bits alone."""
    layer, x = prompt_layer(bits, group, offset), inputs(19).bfloat16()
    found = layer(x)
    weight, bias = layer.unpacked().bfloat16().double(), layer.bias
    assert bias is not None
    wanted = x.double() @ weight.T + bias.double()
    assert found.dtype == torch.bfloat16 and error(found, wanted) < 2.5e-3
    for row in (0, 8, 18):
        assert torch.equal(layer(x[row : row + 1])[0], found[row])
    assert torch.equal(layer(x.view(1, 19, -1))[0], found)


def as_decoded(layer: PackedLinear, x: Tensor) -> Tensor:
    """A layer's output as the engine decodes it, rounded to bfloat16. x [rows, in]."""
    matrix = layer._matrix(layer.rounded_parts(), True)
    matrix.bias = None if layer.bias is None else layer.bias.data_ptr()
    return ops.multiply(matrix, x.float(), ops.Arena()).bfloat16()


@every_grid
def test_lines_in_bytes_give_the_bits_of_lines_in_bfloat16(
    bits: int, group: int, offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of decoding and of prompts, and rows that an embedding reads."""
    layer, x = prompt_layer(bits, group, offset), inputs(19).bfloat16()
    monkeypatch.setattr(Lines, "of", lambda *_: None)
    wide = prompt_layer(bits, group, offset)
    assert wide._exponent is None and (layer._exponent is None) == (bits == 8)
    assert torch.equal(as_decoded(layer, x), as_decoded(wide, x))
    assert torch.equal(layer(x), wide(x))
    with rounding():
        assert torch.equal(layer(x), wide(x))
        part = Rows(first=16, count=16, run=16, stride=16)
        assert torch.equal(layer.part(x, part), wide.part(x, part))
    if not offset:
        tokens = torch.tensor([40, 3, 17], dtype=torch.int32)
        each = (abi.Embedding(one.exact_matrix()[0], 0, 1.0) for one in (layer, wide))
        first, second = (ops.embed(how, tokens) for how in each)
        assert torch.equal(first, second)


@every_grid
def test_a_prompts_product_with_activations_of_8_bits_is_that_of_decoding(
    in_bytes: None, bits: int, group: int, offset: bool, threads: int
) -> None:
    layer, x = prompt_layer(bits, group, offset), inputs(19).bfloat16()
    with rounding():
        found = layer(x)
        assert torch.equal(found, as_decoded(layer, x))
        for row in (0, 3, 18):
            assert torch.equal(layer(x[row : row + 1])[0], found[row])
    assert not torch.equal(found, layer(x)), "weights in bfloat16 give others"


def test_a_value_that_stands_out_costs_the_others_of_its_block_nothing(in_bytes: None) -> None:
    layer, x = prompt_layer(8, 32, False), inputs(9).bfloat16()
    wanted = x.double() @ layer.unpacked().double().T + layer.bias.double()
    with rounding():
        found = layer(x)
    plain = [row for row in range(9) if row % 3]
    assert error(found[::3], wanted[::3]) < 1.5 * error(found[plain], wanted[plain])


def test_a_prompts_product_with_a_table(prompts: None) -> None:
    generator = torch.Generator().manual_seed(3)
    codes, scale = torch.randint(0, 16, (70, 128), generator=generator), torch.rand(70, 2)
    book = torch.randn(16, generator=generator)
    layer, x = PackedLinear(codes, scale, None, book, None), inputs(9, 128).bfloat16()
    wanted = x.double() @ layer.unpacked().bfloat16().double().T
    assert error(layer(x), wanted) < 2.5e-3
    with rounding():
        if ops.prefill_units() == PrefillUnits.VECTORS:
            assert torch.equal(layer(x), as_decoded(layer, x))
        else:  # scales and the table are those of decoding, activations are not
            assert 0 < error(layer(x), as_decoded(layer, x).double()) < 0.03


@pytest.mark.parametrize(
    "rows", [Rows(16, 64, 64, 64), Rows(8, 64, 64, 64), Rows(16, 32, 16, 48), Rows(8, 16, 8, 48)]
)
def test_parts_of_a_fused_weight(prompts: None, rows: Rows) -> None:
    """Whole tiles are multiplied alone, others are taken out of all."""
    layer, x = prompt_layer(4, 32, True, 96), inputs(5).bfloat16()
    assert torch.equal(layer.part(x, rows), rows.columns(layer(x)))
    with rounding():
        assert torch.equal(layer.part(x, rows), rows.columns(layer(x)))


def test_gradients_pass_a_prompts_product(prompts: None) -> None:
    layer = prompt_layer(4, 32, False)
    with torch.inference_mode(False), torch.enable_grad():
        x = inputs(3).bfloat16().clone().requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None and bool(x.grad.any())


@every_grid
def test_a_product_is_float64s(bits: int, group: int, offset: bool) -> None:
    grid, x = random_grid(bits, group, offset), inputs(9)
    with streaming():
        found = PackedLinear.of(grid)(x)
    assert error(found, x.double() @ grid.weight().double().T) < 1e-6


@every_grid
@pytest.mark.parametrize("rounded", [False, True])
def test_the_engines_product_is_float64s_of_the_same_activations(
    engines: dict[bool, Engine], bits: int, group: int, offset: bool, rounded: bool, threads: int
) -> None:
    """Rounded activations meet the grid's own numbers: nothing else is rounded. A row has the same
    bits alone, with 7 and with 47 others."""
    grid, x = random_grid(bits, group, offset), inputs(48)
    multiply = engines[rounded].multiplier(PackedLinear.of(grid))
    whole = multiply(x)
    given = to_8_bits(x) if rounded else x.double()
    assert error(whole, given @ grid.weight().double().T) < 2e-6
    assert torch.equal(multiply(x[8:16]), whole[8:16])
    for row in (0, 11, 47):
        assert torch.equal(multiply(x[row : row + 1])[0], whole[row])


def test_any_number_of_threads_gives_the_same_bits(engines: dict[bool, Engine]) -> None:
    layer, x = PackedLinear.of(random_grid(3, 32, True)), inputs(5)
    multiply, before, found = engines[True].multiplier(layer), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(multiply(x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_bits_without_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bits"):
        PackedLinear(torch.zeros(8, 32), torch.ones(8, 1), None, None, None, 5)


# -- whole models -----------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", [4, 6, 8])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_model_of_mixed_bits(
    tiny_llama: Path, embedding: int, rounded: bool, threads: int
) -> None:
    """The native engine has torch's states: exactly but for the order of sums without rounding,
    and within the error of 8 bits with it; rows are the same together and alone."""
    plain = SkippingModel(on_grids(load_model(tiny_llama, "float32"), MIXED, embedding))
    model = on_grids(load_model(tiny_llama, "float32"), MIXED, embedding)
    assert accelerate_linears(model) == {"PackedLinear": 4 * 7}
    fast = SkippingModel(model, None, "project", "native", rounded)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 512, (1, 40), generator=generator)
    caches = [each.new_cache(1, 64) for each in (plain, fast, fast)]
    for each, cache in zip((plain, fast, fast), caches, strict=True):
        each.forward(ids[:, :20], cache, [0])
    rest = ids[:, 20:].tolist()
    wanted, found = (
        plain.decode(rest, caches[0], [0], [20]),
        fast.decode(rest, caches[1], [0], [20]),
    )
    bound = 0.06 if rounded else 1e-5
    assert error(found, wanted.double()) < bound
    steps = [fast.decode([[n]], caches[2], [0], [20 + i]) for i, n in enumerate(rest[0])]
    assert torch.equal(torch.cat(steps), found)
    assert torch.equal(fast.head(found)[3:4], fast.head(steps[3]))


def test_prompts_of_packed_weights_meet_what_decoding_meets(
    tiny_llama: Path, in_bytes: None
) -> None:
    """In bfloat16, where our kernel multiplies: near the states of weights in bfloat16, a row alone
    as beside others, and named."""

    def packed(rounded: bool) -> SkippingModel:
        model = on_grids(load_model(tiny_llama, "bfloat16"), MIXED, 8)
        accelerate_linears(model)
        return SkippingModel(model, None, "project", "native", rounded)

    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    plain, bytes_ = packed(False), packed(True)
    wanted, found = (each.forward(ids, each.new_cache(2, 40), [0, 0]) for each in (plain, bytes_))
    assert not torch.equal(found, wanted)
    assert error(found.flatten(0, 1), wanted.flatten(0, 1).double()) < 0.06
    alone = bytes_.forward(ids[1:], bytes_.new_cache(1, 40), [0])
    assert torch.equal(alone[0], found[1])
    names = [each.arithmetic(scoring=True).activations for each in (plain, bytes_)]
    assert names == ["bfloat16", "8 bits in blocks of 32, 16 where a value stands out"]
    head = load_model(tiny_llama, "bfloat16")
    grid = round_to_grid(head.lm_head.weight.float(), torch.ones(64), 8, 32, "none")
    head.set_output_embeddings(PackedLinear.of(grid))
    engine = SkippingModel(head, None, "project", "native", True)
    assert engine.arithmetic(scoring=True).activations == "bfloat16", "no layer is packed"


def test_packed_prompts_are_in_bytes_where_bfloat16_is_slow(
    tiny_llama: Path, in_bytes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits; beside a dense layer, prompts pass in float32."""
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))

    def states(whole: bool) -> tuple[Tensor, str]:
        model = load_model(tiny_llama, "bfloat16")
        dense = model.model.layers[0].mlp.down_proj
        model = on_grids(model, MIXED, 8)
        if not whole:
            model.model.layers[0].mlp.down_proj = dense
        accelerate_linears(model)
        skipping = SkippingModel(model, None, "project", "native", True)
        found = skipping.forward(ids, skipping.new_cache(2, 40), [0, 0])
        return found, skipping.arithmetic(scoring=True).activations

    wanted, _ = states(whole=True)
    for module in (packed_linear, native_prefill):
        monkeypatch.setattr(module, "bfloat16_is_faster", lambda: False)
    found, activations = states(whole=True)
    assert torch.equal(found, wanted) and activations == native.IN_BYTES
    assert states(whole=False)[1] == "float32"


@pytest.mark.parametrize(("embedding", "kind"), [(4, "INT4"), (6, "INT6"), (8, "INT8")])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_head_on_a_grid_is_not_rounded_again(
    tiny_llama: Path, embedding: int, kind: str, rounded: bool
) -> None:
    model = on_grids(load_model(tiny_llama, "float32"), {"": 4}, embedding)
    accelerate_linears(model)
    engine = Engine(model, None, rounded=rounded)
    assert Kind(engine.head.kind).name == kind + ("_A8" if rounded else "")
    hidden = inputs(9, 64)
    given = to_8_bits(hidden) if rounded else hidden.double()
    weight = model.get_output_embeddings().grid().weight().double()
    assert error(engine.logits(hidden), given @ weight.T) < 1e-6


def test_a_draft_looks_tokens_up_in_the_embedding(tiny_llama: Path) -> None:
    """A native draft is the greedy tokens of single steps."""
    model = on_grids(load_model(tiny_llama, "float32"), {"": 3}, 6)
    accelerate_linears(model)
    fast = SkippingModel(model, None, "project", "native", True)
    ids = torch.randint(3, 512, (1, 12), generator=torch.Generator().manual_seed(2))
    cache = fast.new_cache(1, 40)
    fast.forward(ids, cache, [0])
    assert fast.engine is not None
    drafted = fast.engine.sample(
        SampleRequest(9, 5, limit=DraftLimit(0.0, [1.0])), (cache, 0, 12), None
    )
    last, stepped = 9, []
    for slot in range(12, 17):
        last = int(fast.head(fast.decode([[last]], cache, [0], [slot]))[0].argmax())
        stepped.append(last)
    assert drafted.tokens == stepped
