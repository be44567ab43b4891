"""leetcore.torch.nn: a layer says the same of a sequence, of its pieces and of its tokens one by one."""

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
    if isinstance(layer, nn.Retention):  # its rotations run on: the same up to rounding, as only distances count
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
    ],
    ids=["width", "decay", "growth", "nan", "heads", "odd", "layer"],
)
def test_refusals(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_steps_need_no_grad(layer, x):
    with pytest.raises(NotImplementedError, match="decode_step has no gradient"):
        layer.step(x[:, 0], layer.new_state(B))
