"""leetcore.compat.fla, compared with flash-linear-attention's references in plain torch.

fla-core is not imported, as that needs triton; its files of references are read by their paths.
"""

import ast
import importlib.metadata
import importlib.util
import inspect

import pytest
import torch
from leetcore.compat import fla
from leetcore.torch import linear_attention

B, T, H, K, V = 2, 70, 4, 8, 6
CHUNK = [fla.chunk_simple_gla, fla.chunk_retention, fla.chunk_lightning_attn]
RECURRENT = [fla.fused_recurrent_simple_gla, fla.fused_recurrent_retention, fla.fused_recurrent_lightning_attn]
LAYER = {"layer_idx": 1, "num_layers": 5}


@pytest.fixture(scope="module")
def naive():
    """The modules naive.py of fla-core, by folder."""
    distribution = importlib.metadata.distribution("fla-core")
    modules = {}
    for folder in ("simple_gla", "retention", "linear_attn"):
        path = distribution.locate_file(f"fla/ops/{folder}/naive.py")
        spec = importlib.util.spec_from_file_location(f"naive_{folder}", path)
        modules[folder] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[folder])
    return modules


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    q, k = torch.randn(2, B, T, H, K)
    return q, k, torch.randn(B, T, H, V), -torch.rand(B, T, H), torch.randn(B, H, K, V)


def assert_close(got, want, tolerance=5e-6):
    assert got.shape == want.shape and (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("name", fla.__all__)
def test_parameters_and_defaults_are_those_of_fla(name):
    form = next(form for form in ("chunk", "fused_chunk", "fused_recurrent", "parallel") if name.startswith(form))
    path = importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{name.removeprefix(form + '_')}/{form}.py")
    theirs = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name).args
    ours = [p for p in inspect.signature(getattr(fla, name)).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours] == [a.arg for a in theirs.args]
    assert [p.default for p in ours if p.default is not p.empty] == [ast.literal_eval(x) for x in theirs.defaults]


def test_every_name_of_the_modules_of_fla_is_served():
    names = []
    for folder in ("simple_gla", "retention", "lightning_attn", "linear_attn"):
        path = importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{folder}/__init__.py")
        listed = next(
            node.value
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        )
        names += ast.literal_eval(listed)
    assert sorted(names) == sorted(fla.__all__)


@pytest.mark.parametrize("call", [fla.chunk_simple_gla, fla.fused_chunk_simple_gla, fla.fused_recurrent_simple_gla])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_simple_gla(naive, tensors, call, scale):
    q, k, v, g, h0 = tensors
    want = naive["simple_gla"].naive_recurrent_simple_gla(q, k, v, g, scale=scale, initial_state=h0)
    got = call(q, k, v, g, scale=scale, initial_state=h0, output_final_state=True)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y)
    o, state = call(q, k, v, g_gamma=g[0, 0], scale=scale)
    assert_close(o, naive["simple_gla"].naive_recurrent_simple_gla(q, k, v, g[:1, :1].expand(B, T, H), scale=scale)[0])
    assert state is None


def test_gradients_of_simple_gla(naive, tensors):
    leaves = [x.requires_grad_() for x in tensors]
    results = []
    for call in (fla.chunk_simple_gla, naive["simple_gla"].naive_recurrent_simple_gla):
        q, k, v, g, h0 = leaves
        o, state = call(q, k, v, g, initial_state=h0, output_final_state=True)
        results.append(torch.autograd.grad(o.square().sum() + state.sum(), leaves))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 2e-5)


def test_a_constant_decay_has_a_gradient_too(tensors):
    q, k, v, g, _ = tensors
    g_gamma = g[0, 0].requires_grad_()
    (got,) = torch.autograd.grad(fla.chunk_simple_gla(q, k, v, g_gamma=g_gamma)[0].square().sum(), g_gamma)
    (want,) = torch.autograd.grad(fla.chunk_simple_gla(q, k, v, g_gamma.expand(B, T, H))[0].square().sum(), g_gamma)
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize(
    "call", [fla.chunk_retention, fla.fused_chunk_retention, fla.fused_recurrent_retention, fla.parallel_retention]
)
def test_retention(naive, tensors, call):
    q, k, v, _, _ = tensors
    want = naive["retention"].naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert_close(call(q, k, v)[0], want)


def test_gradients_of_retention(naive, tensors):
    leaves = [x.requires_grad_() for x in tensors[:3]]
    want = naive["retention"].naive_retention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    results = [torch.autograd.grad(o.square().sum(), leaves) for o in (fla.chunk_retention(*leaves)[0], want)]
    for x, y in zip(*results, strict=True):
        assert_close(x, y, 2e-5)


@pytest.mark.parametrize("call", [fla.chunk_lightning_attn, fla.fused_recurrent_lightning_attn])
def test_lightning_attn(naive, tensors, call):
    """fla has no reference for lightning attention; its code passes this g_gamma to simple_gla."""
    q, k, v, _, h0 = tensors
    g_gamma = -(8 / H * (1 - LAYER["layer_idx"] / LAYER["num_layers"])) * torch.arange(H, dtype=torch.float)
    want = naive["simple_gla"].naive_recurrent_simple_gla(q, k, v, g_gamma.expand(B, T, H), initial_state=h0)
    for x, y in zip(call(q, k, v, **LAYER, initial_state=h0, output_final_state=True), want, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attn(naive, tensors, normalize, state):
    q, k, v, _, h0 = tensors
    q, k = q.abs(), k.abs()  # sums of weights far from 0
    initial = ((h0, torch.rand(B, 1, H, K)) if normalize else h0) if state else None
    reference = naive["linear_attn"].naive_recurrent_linear_attn
    want = reference(q, k, v, initial_state=initial, output_final_state=True, normalize=normalize)
    got = fla.chunk_linear_attn(q, k, v, initial_state=initial, output_final_state=True, normalize=normalize)
    assert_close(got[0], want[0])
    for x, y in zip(*([r[1] if normalize else (r[1],) for r in (got, want)]), strict=True):
        assert_close(x, y)
    assert fla.chunk_linear_attn(q, k, v, normalize=normalize)[1] is None


def test_normalised_linear_attn_is_differentiable():
    torch.manual_seed(0)
    q, k = (torch.rand(1, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    z = torch.rand(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, kv, z):
        o, (kv, z) = fla.chunk_linear_attn(q, k, v, initial_state=(kv, z), output_final_state=True)
        return o, kv, z

    assert torch.autograd.gradcheck(call, (q, k, v, kv, z))


@pytest.mark.parametrize("call", RECURRENT)
@pytest.mark.parametrize("packed", [False, True])
def test_reverse_is_the_reversed_sequence(tensors, call, packed):
    q, k, v, g, h0 = tensors
    options = LAYER if "layer_idx" in inspect.signature(call).parameters else {}
    if call is fla.fused_recurrent_simple_gla:
        options = {"g": g}
    lengths = [T]
    if packed:
        lengths = [30, 0, T - 30]
        q, k, v, h0 = q[:1], k[:1], v[:1], torch.randn(3, H, K, V)
        options = {name: x[:1] if name == "g" else x for name, x in options.items()}
        options["cu_seqlens"] = torch.tensor([0, 30, 30, T])
    o, state = call(q, k, v, initial_state=h0, output_final_state=True, reverse=True, **options)
    options.pop("cu_seqlens", None)
    g = options.pop("g", None)
    for i, (part, start) in enumerate(zip(lengths, (0, 30, 30), strict=False)):
        some = slice(start, start + part)
        one = {"initial_state": h0[i : i + 1] if packed else h0, "output_final_state": True, **options}
        if g is not None:
            one["g"] = g[:, some].flip(1)
        want, final = call(*(x[:, some].flip(1) for x in (q, k, v)), **one)
        assert torch.equal(o[:, some], want.flip(1)) or (o[:, some] - want.flip(1)).norm() <= 5e-6 * want.norm()
        assert_close(state[i : i + 1] if packed else state, final)


@pytest.mark.parametrize("call", [fla.chunk_simple_gla, fla.fused_recurrent_simple_gla])
def test_states_with_v_first(tensors, call):
    q, k, v, g, h0 = tensors
    o, state = call(q, k, v, g, initial_state=h0, output_final_state=True)
    other, transposed = call(
        q, k, v, g, initial_state=h0.transpose(2, 3).contiguous(), output_final_state=True, state_v_first=True
    )
    assert torch.equal(other, o) and torch.equal(transposed, state.transpose(2, 3))


def test_packed_sequences(tensors):
    q, k, v, g, _ = tensors
    cu_seqlens = torch.arange(B + 1) * T
    packed = [x.flatten(0, 1)[None] for x in (q, k, v, g)]
    o, state = fla.chunk_simple_gla(*packed, output_final_state=True, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens)
    want, final = fla.chunk_simple_gla(q, k, v, g, output_final_state=True)
    assert_close(o[0], want.flatten(0, 1))
    assert_close(state, final)


def test_gates_and_states_in_bfloat16(tensors):
    q, k, v, g, h0 = (x.bfloat16() for x in tensors)
    o, state = fla.chunk_simple_gla(q, k, v, g, initial_state=h0, output_final_state=True)
    want = linear_attention(
        q, k, v, g.float(), scale=K**-0.5, initial_state=h0.float(), return_state=True, layout="bnhd"
    )
    assert torch.equal(o, want[0]) and torch.equal(state, want[1]) and state.dtype == torch.float32


def test_compile_without_a_break(tensors):
    torch._dynamo.reset()
    q, k, v, _, _ = tensors
    for call in (fla.chunk_retention, lambda *x: fla.chunk_lightning_attn(*x, **LAYER), fla.chunk_linear_attn):
        assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)[0], call(q, k, v)[0])


@pytest.mark.parametrize("call", [*CHUNK, *RECURRENT, fla.chunk_linear_attn])
def test_what_is_refused(tensors, call):
    q, k, v, g, _ = tensors
    options = LAYER if "layer_idx" in inspect.signature(call).parameters else {}
    with pytest.raises(TypeError, match="head_first"):
        call(q, k, v, head_first=False, **options)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected B = 1 with packed sequences, got B = 2"):
        call(q, k, v, cu_seqlens=torch.tensor([0, T]), **options)
    if "g_gamma" in inspect.signature(call).parameters:
        with pytest.raises(ValueError, match=r"^g_gamma: expected None where g is given, got both"):
            call(q, k, v, g, g[0, 0])
        with pytest.raises(ValueError, match=r"^log_decay: expected values <= 0"):
            call(q, k, v, -g)


def test_states_of_another_kind_are_refused(tensors):
    q, k, v, _, h0 = tensors
    with pytest.raises(TypeError, match=r"^initial_state: expected a tensor where normalize is False, got a tuple"):
        fla.chunk_linear_attn(q, k, v, initial_state=(h0, torch.rand(B, 1, H, K)), normalize=False)
    with pytest.raises(TypeError, match=r"^initial_state: expected a torch\.Tensor, got list"):
        fla.chunk_simple_gla(q, k, v, initial_state=[h0])


@pytest.mark.parametrize("gated", [False, True])
def test_parallel_gives_the_weights(naive, tensors, gated):
    q, k, v, g, _ = tensors
    want = naive["simple_gla"].naive_parallel_simple_gla(q, k, v, g if gated else torch.zeros_like(g))
    got = fla.parallel_simple_gla(q, k, v, g if gated else None, output_attentions=True)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y)
    assert not fla.parallel_simple_gla(q.requires_grad_(), k, v, g, output_attentions=True)[1].requires_grad
    assert fla.parallel_simple_gla(q, k, v, g)[1] is None and fla.parallel_retention(q, k, v)[1] is None
    o, weights = fla.parallel_retention(q, k, v, output_attentions=True)
    assert_close(weights @ v.transpose(1, 2), o.transpose(1, 2))
    with pytest.raises(ValueError, match=r"^output_attentions: expected False with cu_seqlens, got True"):
        fla.parallel_simple_gla(q[:1], k[:1], v[:1], output_attentions=True, cu_seqlens=torch.tensor([0, T]))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("call", [fla.chunk_linear_attn, fla.fused_chunk_linear_attn, fla.fused_recurrent_linear_attn])
def test_linear_attn_of_every_form(naive, tensors, call, normalize):
    q, k, v, _, _ = tensors
    q, k = q.abs(), k.abs()
    want = naive["linear_attn"].naive_recurrent_linear_attn(q, k, v, output_final_state=True, normalize=normalize)
    o, state = call(q, k, v, output_final_state=True, normalize=normalize)
    assert_close(o, want[0])
    for x, y in zip(state, want[1], strict=True) if normalize else [(state, want[1])]:
        assert_close(x, y)
    if call is fla.fused_recurrent_linear_attn:
        back, other = call(*(x.flip(1) for x in (q, k, v)), output_final_state=True, reverse=True, normalize=normalize)
        assert_close(back.flip(1), o)
        for x, y in zip(other, state, strict=True) if normalize else [(other, state)]:
            assert_close(x, y)


@pytest.mark.parametrize("call", [fla.fused_recurrent_simple_gla, fla.fused_recurrent_retention])
def test_the_older_name_of_state_v_first(tensors, call):
    q, k, v, _, h0 = tensors
    given = {"initial_state": h0.mT.contiguous(), "output_final_state": True}
    want = call(q, k, v, **given, state_v_first=True)
    with pytest.warns(DeprecationWarning, match=r"^transpose_state_layout is fla's deprecated name of state_v_first"):
        got = call(q, k, v, **given, transpose_state_layout=True)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    with pytest.raises(ValueError, match=r"^transpose_state_layout: expected None with state_v_first"):
        call(q, k, v, state_v_first=True, transpose_state_layout=False)
