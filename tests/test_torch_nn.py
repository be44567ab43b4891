"""leetcore.torch.nn: a layer gives the same results for a sequence, its pieces and its tokens."""

import copy
import io
import pickle

import leetcore
import pytest
import torch
import torch._dynamo.testing
from leetcore.torch import nn

B, N, C = 2, 40, 32
LAYERS = {
    "linear": lambda: nn.LinearAttention(C, 4),
    "decayed": lambda: nn.LinearAttention(C, 4, head_dim=6, log_decay=leetcore.decay.alibi(4)),
    "lightning": lambda: nn.Lightning(C, 4, layer=1, num_layers=3),
    "retention": lambda: nn.Retention(C, 4),
    "rope": lambda: nn.Retention(C, 4, rotation="rope"),
    "gated": lambda: nn.GatedLinearAttention(C, 4),
}
FIXED = [name for name in LAYERS if name not in ("linear", "gated")]


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


@pytest.fixture
def x():
    return torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_pieces_and_steps_are_the_sequence(layer, x):
    want = layer(x)
    state = layer.new_state(B)
    with torch.no_grad():
        got = [layer(x[:, :17], state), layer(x[:, 17:18], state), layer(x[:, 18:30], state)]
        got += [layer.step(x[:, t], state)[:, None] for t in range(30, N)]
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-12, atol=1e-12)
    assert state.position == N and state.memory.shape == (B, 4, layer.key_dim, layer.value_dim)


def test_the_state_after_steps_is_the_state_after_the_sequence(layer, x):
    at_once, by_steps = layer.new_state(B), layer.new_state(B)
    with torch.no_grad():
        layer(x, at_once)
        for t in range(N):
            layer.step(x[:, t], by_steps)
    torch.testing.assert_close(at_once.memory, by_steps.memory, rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_parameter_and_flow_through_states(layer, x):
    together = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    state, loss = layer.new_state(B), 0
    for part in x.split(15, dim=1):
        loss = loss + layer(part, state).square().sum()
    in_parts = torch.autograd.grad(loss, list(layer.parameters()))
    for whole, parts in zip(together, in_parts, strict=True):
        assert whole.any()
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)
    assert state.memory.requires_grad and not state.detach().memory.requires_grad


def test_packed_sequences_do_not_see_each_other(layer, x):
    packed = layer(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, N, 2 * N]))
    if isinstance(
        layer, nn.Retention
    ):  # its angles continue; only their differences count, so results agree up to rounding
        torch.testing.assert_close(packed[0].unflatten(0, (B, N)), layer(x), rtol=1e-10, atol=1e-10)
    else:
        torch.testing.assert_close(packed[0].unflatten(0, (B, N)), layer(x), rtol=1e-12, atol=1e-12)


def test_causality(layer, x):
    later = x.clone()
    later[:, 25:] += 1
    assert torch.equal(layer(x)[:, :25], layer(later)[:, :25])


def test_states_of_chosen_sequences(layer, x):
    state = layer.new_state(B)
    with torch.no_grad():
        layer(x, state)
        chosen = state.select(torch.tensor([1, 1, 0]))
        token = torch.randn(3, C, dtype=torch.float64)
        before = state.memory.clone()
        y = layer.step(token, chosen)
        assert torch.equal(state.memory, before)
        torch.testing.assert_close(y[2:], layer.step(token[2:].expand(2, C), state)[:1])


@pytest.mark.parametrize("name", FIXED)
def test_decays_stay_exact_whatever_the_dtype(name):
    layer = LAYERS[name]()
    want = layer.log_decay.clone()
    for cast in (
        layer.to(torch.bfloat16),
        layer.half(),
        layer.double(),
        layer.float(),
        copy.deepcopy(layer).bfloat16(),
    ):
        assert cast.log_decay.dtype == torch.float32 and torch.equal(cast.log_decay, want)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_is_close(name):
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(B, N, C)
    want = layer(x)
    layer = layer.bfloat16()
    state = layer.new_state(B)
    got = layer(x.bfloat16(), state)
    assert got.dtype == torch.bfloat16 and state.memory.dtype == torch.float32
    assert (got - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict(name, x):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        other = LAYERS[name]()
    assigned = copy.deepcopy(other)
    other.to_empty(device="cpu").load_state_dict(torch.load(file))
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for loaded in (other, assigned, pickle.loads(pickle.dumps(assigned))):
        assert torch.equal(loaded(x.float()), layer(x.float()))


@pytest.mark.parametrize("layer", ["lightning", "gated"], indirect=True)
def test_compiled_once_for_all_lengths(layer, x):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compiled(x)
    compilations = counter.frame_count
    for n in (23, 31):
        part = x[:, :n].clone()
        torch.testing.assert_close(compiled(part), layer(part))
    assert counter.frame_count == compilations


def test_weights_of_minimax_load():
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = modeling.MiniMaxConfig(
        hidden_size=C, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, block_size=16
    )
    torch.manual_seed(0)
    theirs = modeling.MiniMaxLightningAttention(config, 1)
    ours = nn.Lightning(C, 4, layer=1, num_layers=3)
    missing, _ = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    x = torch.randn(B, N, C)
    torch.testing.assert_close(ours(x), theirs(x, None, None)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, text",
    [
        (
            lambda: nn.LinearAttention(30, 4),
            "^embed_dim: expected a multiple of 4 where head dims are not given, got 30",
        ),
        (
            lambda: nn.LinearAttention(C, 4, log_decay=[-1, -2]),
            r"^log_decay: expected a number or shape \[4\], got \[2\]",
        ),
        (lambda: nn.LinearAttention(C, 2, log_decay=[-1, 0.5]), "^log_decay: expected values <= 0, got 0.5"),
        (lambda: nn.LinearAttention(C, 4, log_decay=float("nan")), "^log_decay: expected values <= 0, got nan"),
        (lambda: nn.GatedLinearAttention(C, 0), "^num_heads: expected at least 1, got 0"),
        (lambda: nn.Retention(C, 4, key_dim=5), "^key_dim: expected an even number, as pairs are rotated, got 5"),
        (lambda: nn.Lightning(C, 4, layer=3, num_layers=3), "^layer: expected an integer from 0 to 2, got 3"),
        (lambda: nn.Retention(C, 4, rotation="xpos"), "^rotation: expected 'torchscale' or 'rope', got 'xpos'"),
        (
            lambda: nn.Retention(C, 4, heads=range(2, 5)),
            r"^heads: expected a range .* range\(0, 4\), got range\(2, 5\)",
        ),
        (lambda: nn.Retention(C, 4, heads=2), "^heads: expected a range with step 1 .*, got 2"),
        (
            lambda: nn.LinearAttention(C, 4, log_decay=torch.zeros(4, requires_grad=True)),
            "^log_decay: expected a constant, got a tensor with requires_grad",
        ),
        (
            lambda: nn.LinearAttention(C, 4, log_decay=torch.zeros(4).bfloat16()),
            "^log_decay: expected values in float32 or float64, got torch.bfloat16",
        ),
        (
            lambda: nn.LinearAttention(C, 4, log_decay=torch.zeros(4, device="meta")),
            "^log_decay: expected values in float32 or float64, got a tensor on the device meta",
        ),
    ],
    ids=[
        *("width", "decay", "growth", "nan", "heads", "odd", "layer", "angles", "slice", "number", "learned"),
        *("bfloat16", "meta"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_steps_need_no_grad(layer, x):
    with pytest.raises(NotImplementedError, match="decode_step has no gradient"):
        layer.step(x[:, 0], layer.new_state(B))


MASKS = {  # for two sequences
    "left": [range(13, N), range(N)],
    "right": [range(N - 7), range(20)],
    "middle": [[*range(5), *range(9, 30), *range(31, N)], range(0, N, 2)],
    "nothing": [[], range(3, 20)],
}


@pytest.mark.parametrize("shown", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("first", [False, True], ids=["continued", "first"])
def test_padding_leaves_no_trace(layer, x, shown, first):
    """Outputs, states and gradients are those of packed sequences, even with NaN at padding."""
    mask = torch.zeros(B, N, dtype=torch.bool if first else torch.int64)
    for b, places in enumerate(shown):
        mask[b, list(places)] = 1
    kept = mask.bool()
    cu_seqlens = torch.tensor([0, *kept.sum(1).cumsum(0)])
    padded, packed = layer.new_state(B), layer.new_state(B)
    if not first:
        with torch.no_grad():
            for state in (padded, packed):
                layer(x[:, :11], state)
    start = x.masked_fill(~kept[..., None], float("nan")).requires_grad_()
    y = layer(start, padded, mask=mask)
    assert not y[~kept].any()
    got = [y[kept], padded.memory]
    alone = x[kept][None].requires_grad_()
    if isinstance(layer, nn.Retention):  # angles continue over packed sequences, and start at 0 here
        parts, memories = [], []
        for b, part in enumerate(alone[0].split(kept.sum(1).tolist())):
            state = nn.State(packed.memory[b : b + 1], packed.position)
            parts.append(layer(part[None], state)[0])
            memories.append(state.memory)
        want = [torch.cat(parts), torch.cat(memories)]
    else:
        want = [layer(alone, packed, cu_seqlens=cu_seqlens)[0], packed.memory]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    weights = [torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(3)) for z in want]
    grads = [
        torch.autograd.grad(sum((z * w).sum() for z, w in zip(results, weights, strict=True)), leaf)[0]
        for results, leaf in ((got, start), (want, alone))
    ]
    torch.testing.assert_close(grads[0][kept], grads[1][0], rtol=1e-10, atol=1e-10)
    assert torch.equal(padded.position.expand(B), kept.sum(1) + (0 if first else 11))


def test_steps_after_a_masked_prompt(layer, x):
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 10:], mask[1, :4] = False, False
    state = layer.new_state(B)
    with torch.no_grad():
        layer(x, state, mask=mask)
        got = layer.step(x[:, 0], state)
        for b, places in enumerate((range(10), range(4, N))):
            want = layer(torch.cat([x[b, list(places)], x[b, :1]])[None])[0, -1]
            torch.testing.assert_close(got[b], want, rtol=1e-10, atol=1e-10)
        chosen = state.select(torch.tensor([1]))
        assert chosen.position.tolist() == [N - 4 + 1]


def test_masks_that_are_refused(layer, x):
    for mask, error, text in (
        (torch.ones(B, N + 1), ValueError, rf"^mask: expected shape \[{B}, {N}\], got \[{B}, {N + 1}\]"),
        (torch.ones(B, 1, N, N), ValueError, rf"^mask: expected shape .*got \[{B}, 1, {N}, {N}\]"),
        (torch.ones(B, N), TypeError, "^mask: expected bool or integers, .*got torch.float32"),
        ([[1] * N] * B, TypeError, r"^mask: expected a torch\.Tensor, got list"),
    ):
        with pytest.raises(error, match=text):
            layer(x, mask=mask)
    with pytest.raises(ValueError, match=r"^mask: expected None with cu_seqlens, got both"):
        layer(x[:1], cu_seqlens=torch.tensor([0, N]), mask=torch.ones(1, N, dtype=torch.bool))


def test_masked_calls_compile_whole(layer, x):
    torch._dynamo.reset()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, :9] = False
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask))


def test_a_saved_state_loads_with_weights_only(layer, x):
    state, file = layer.new_state(B), io.BytesIO()
    with torch.no_grad():
        layer(x, state)
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, nn.State) and torch.equal(loaded.memory, state.memory) and loaded.position == N


@pytest.mark.parametrize("rotation", ["torchscale", "rope"])
def test_retention_is_that_of_torchscale_but_for_the_angles(x, rotation):
    """The quadratic form of arXiv:2307.08621, with torchscale's angles and names of parameters.

    They are in torchscale/architecture/retnet.py and component/multiscale_retention.py of
    github.com/microsoft/torchscale.
    """
    torch.manual_seed(0)
    H, K, V = 4, C // 4, C // 2
    names = {"q_proj": H * K, "k_proj": H * K, "v_proj": H * V, "g_proj": H * V}
    w = {name: torch.randn(width, C, dtype=torch.float64) * C**-0.5 for name, width in names.items()}
    w["out_proj"] = torch.randn(C, H * V, dtype=torch.float64)
    layer = nn.Retention(C, H, rotation=rotation).double()
    layer.load_state_dict({f"{name}.weight": value for name, value in w.items()})

    q, k, v = ((x @ w[name].T).unflatten(-1, (H, -1)) for name in ("q_proj", "k_proj", "v_proj"))
    turns = torch.exp(-torch.linspace(0, 1, K // 2, dtype=torch.float64) * torch.log(torch.tensor(10000.0).double()))
    turn = torch.polar(torch.ones(N, 1, K // 2).double(), torch.arange(N)[:, None, None] * turns)
    q, k = (torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) * turn for z in (q, k))
    weights = torch.einsum("bthk,bshk->bhts", q, k.conj()).real * K**-0.5
    distance = torch.arange(N)[:, None] - torch.arange(N)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    weights = torch.where(distance >= 0, weights * gamma[:, None, None] ** distance.clamp(min=0), 0)
    o = torch.einsum("bhts,bshv->bthv", weights, v)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-6) ** -0.5
    g = x @ w["g_proj"].T
    want = (g * torch.sigmoid(g) * o.flatten(-2)) @ w["out_proj"].T

    error = ((layer(x) - want).norm() / want.norm()).item()
    assert error < 1e-6 if rotation == "torchscale" else error > 0.02  # decays are float32


def test_slices_of_heads_add_up_to_the_layer(x):
    torch.manual_seed(0)
    whole = nn.Retention(C, 4).double()
    total, width = 0, {"q_proj": 8, "k_proj": 8, "v_proj": 16, "g_proj": 16, "out_proj": 16}
    for heads in (range(1), range(1, 4)):
        part = nn.Retention(C, 4, heads=heads).double()
        rows = {name: slice(heads.start * w, heads.stop * w) for name, w in width.items()}
        part.load_state_dict(
            {
                f"{name}.weight": getattr(whole, name).weight[
                    (slice(None), rows[name]) if name == "out_proj" else rows[name]
                ]
                for name in width
            }
        )
        total = total + part(x)
    torch.testing.assert_close(total, whole(x), rtol=1e-10, atol=1e-10)
