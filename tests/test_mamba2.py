"""Mamba-2 of transformers, of mamba_ssm and of leetcore.torch.nn: all give the same numbers.

One file: every test needs the small models and the definition at its head.
"""

import copy
import functools
import importlib
import itertools
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from leetcore import reference  # noqa: E402
from leetcore.compat import mamba_ssm as compat  # noqa: E402
from leetcore.torch import nn as layers  # noqa: E402
from leetcore.torch.integrations.transformers import mamba2, patch, unpatch  # noqa: E402
from transformers import DynamicCache  # noqa: E402

B, N, VOCABULARY = 2, 40, 60
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16}
# Names of models, their classes, and what makes them small.
FAMILIES = {
    "mamba2": (
        "Mamba2",
        {"num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16},
    ),
    "bamba": (
        "Bamba",
        dict(**ATTENTION, **MAMBA, num_hidden_layers=3, intermediate_size=32, attn_layer_indices=[1], mamba_n_groups=2),
    ),
    "falcon_h1": (
        "FalconH1",
        dict(
            **ATTENTION,
            **MAMBA,
            num_hidden_layers=2,
            intermediate_size=32,
            head_dim=16,
            mamba_d_ssm=64,
            mamba_d_head=16,
            ssm_in_multiplier=0.5,
            ssm_multipliers=[0.5, 0.7, 1.1, 0.9, 1.3],
        ),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        dict(
            **ATTENTION, **MAMBA, **MOE, num_hidden_layers=2, intermediate_size=32, layer_types=["mamba", "attention"]
        ),
    ),
    "nemotron_h": (
        "NemotronH",
        dict(
            **ATTENTION,
            intermediate_size=32,
            head_dim=16,
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=2,
            chunk_size=16,
            num_hidden_layers=3,
            layers_block_type=["mamba", "moe", "attention"],
            n_routed_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
        ),
    ),
    "zamba2": (
        "Zamba2",
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "n_mamba_heads": 4,
            "mamba_d_state": 16,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "intermediate_size": 32,
        },
    ),
}
FAMILIES["falcon_h1 with a norm"] = ("FalconH1", {**FAMILIES["falcon_h1"][1], "mamba_rms_norm": True})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads make these small models many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def models(family):
    """A small model in float32: original and patched. Its logits differ by more than rounding."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **options, initializer_range=0.2)
    original = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for mixer in mixers(original):
            mixer.dt_bias.uniform_(-3, 0)  # step sizes like those of a trained layer
    patched = copy.deepcopy(original)
    patch(patched)
    return original, patched


def mixers(model):
    return [m for m in model.modules() if hasattr(m, "A_log")]


def mixer(family="mamba2", which=1):
    return mixers(models(family)[which])[0]


@pytest.fixture(scope="module")
def tokens():
    """Token numbers and the mask of a batch whose first sequence is padded on the left."""
    ids = torch.randint(3, VOCABULARY, (B, N), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    return ids.masked_fill(mask == 0, 0), mask


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(got, want):
    assert got.shape == want.shape
    return ((got - want).double().norm() / want.double().norm()).item()


def assert_close(got, want, tolerance=2e-5):
    assert error(got, want) <= tolerance


# ---- models of transformers


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_left_padding(family, tokens):
    ids, mask = tokens
    want, got = (model(ids, attention_mask=mask).logits[mask.bool()] for model in models(family))
    assert_close(got, want)


@pytest.mark.parametrize("family, beams", [*((family, 1) for family in FAMILIES), ("mamba2", 3), ("falcon_h1", 3)])
def test_generate_gives_the_same_tokens(family, beams, tokens):
    ids, mask = tokens
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    results = [model.generate(ids, **given) for model in models(family)]
    assert torch.equal(*results)
    assert results[0].shape[1] == N + 6


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_the_way_back(family, tokens):
    """unpatch restores the classes and every bit of the logits."""
    ids, _ = tokens
    original, patched = (copy.deepcopy(model).train() for model in models(family))
    kinds = [type(m) for m in mixers(original)]
    for model in (original, patched):
        model(ids, labels=ids).loss.backward()
    for (name, p), q in zip(original.named_parameters(), patched.named_parameters(), strict=True):
        assert name == q[0] and torch.equal(p, q[1])
        if p.grad is not None and p.grad.norm() > 1e-6:
            assert error(q[1].grad, p.grad) <= 1e-4, name
    assert all(isinstance(m, kind) and type(m) is not kind for m, kind in zip(mixers(patched), kinds, strict=True))
    assert unpatch(patched) == len(kinds) and [type(m) for m in mixers(patched)] == kinds and unpatch(patched) == 0
    with torch.no_grad():
        assert torch.equal(original.eval()(ids).logits, patched.eval()(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
@pytest.mark.parametrize("cuts", [(20,), (20, 21, 22), (2, 5)], ids=str)
def test_logits_of_a_prompt_in_pieces(family, tokens, cuts):
    ids, mask = tokens
    (original, patched), pieces = models(family), []
    want = original(ids, attention_mask=mask).logits
    cache = DynamicCache(config=patched.config)
    for start, end in zip((0, *cuts), (*cuts, N), strict=True):
        given = {"attention_mask": mask[:, :end], "use_cache": True, "cache": cache}
        pieces.append(patched(ids[:, start:end], **given).logits)
    assert_close(torch.cat(pieces, dim=1)[mask.bool()], want[mask.bool()])


@torch.no_grad()
def test_patching_one_model_leaves_another_as_it_is(tokens):
    ids, _ = tokens
    original = models("mamba2")[0]
    want, other = original(ids).logits, copy.deepcopy(original)
    assert patch(other) == patch(other) == 2  # twice is once
    assert torch.equal(original(ids).logits, want)
    assert type(mixers(original)[0]).__module__.startswith("transformers.")


@torch.no_grad()
def test_a_cache_of_the_unpatched_model_continues(tokens):
    ids, _ = tokens
    original, patched = models("mamba2")
    want, cache = original(ids).logits[:, 20:], DynamicCache(config=original.config)
    original(ids[:, :20], use_cache=True, cache=cache)
    got = [patched(ids[:, t : t + 1], use_cache=True, cache=cache).logits for t in range(20, 24)]
    got.append(patched(ids[:, 24:], use_cache=True, cache=cache).logits)
    assert_close(torch.cat(got, dim=1), want)


@torch.no_grad()
def test_states_of_a_cache_keep_their_places_and_strides(tokens):
    """Also after a beam search has moved them."""
    ids, _ = tokens
    patched = models("mamba2")[1]
    cache = DynamicCache(config=patched.config)
    patched(ids, use_cache=True, cache=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    before = [t for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]
    places = [(t.data_ptr(), t.stride(), t.dtype) for t in before]
    copies = [t.clone() for t in before]
    for _ in range(3):
        patched(ids[:, :1], use_cache=True, cache=cache)
    patched(ids[:, :7], use_cache=True, cache=cache)
    after = [t for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]
    assert [(t.data_ptr(), t.stride(), t.dtype) for t in after] == places
    assert not any(torch.equal(a, b) for a, b in zip(after, copies, strict=True))
    assert all(t.dtype == torch.float32 for t in after)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
@pytest.mark.parametrize(
    "shown",
    [range(7, N), range(N - 11), [*range(4), *range(14, 20), *range(21, N)], range(N)],
    ids=["left", "right", "middle", "none"],
)
@pytest.mark.parametrize("cuts", [(), (20,), (10, 12)], ids=str)
def test_padding_neither_enters_nor_decays_a_state(family, shown, cuts):
    """Outputs and states are those of the tokens without padding, and one more step agrees."""
    layer = copy.deepcopy(mixer(family))
    if layer.in_proj.bias is None:  # a bias makes a masked token other than 0
        layer.in_proj.bias = torch.nn.Parameter(normal(layer.in_proj.out_features, seed=3) / 3)
    layer.time_step_limit = (0.01, 1.0)
    x, config = normal(B, N, 32), models(family)[0].config
    x[:, [t for t in range(N) if t not in shown]] = float("nan")
    mask = torch.zeros(B, N, dtype=torch.int64)
    mask[:, list(shown)] = 1
    want, got = (DynamicCache(config=config) for _ in range(2))
    y, parts = layer(x[:, list(shown)], cache=want), []
    for start, end in zip((0, *cuts), (*cuts, N), strict=True):
        parts.append(layer(x[:, start:end], cache=got, attention_mask=mask[:, :end]))
    assert_close(torch.cat(parts, dim=1)[:, list(shown)], y)
    for of in ("conv_states", "recurrent_states"):
        assert_close(*(getattr(cache.layers[layer.layer_idx], of)[0] for cache in (got, want)))
    one = normal(B, 1, 32, seed=1)
    assert_close(layer(one, cache=got), layer(one, cache=want))


@torch.no_grad()
@pytest.mark.parametrize("by", ["seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
def test_packed_rows(family, by):
    """Sequences of a row do not mix. The cache gets the states of the last sequence of each row."""
    rows, layer = (1 if by == "cu_seqlens" else 2), mixer(family)
    x = normal(rows, N, 32)
    lengths = [[5, 1, 32, 2], [N]][:rows]
    starts = [torch.tensor([0, *row]).cumsum(0) for row in lengths]
    seq_idx = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    given = {"seq_idx": seq_idx.int()} if by == "seq_idx" else {"cu_seqlens": starts[0].int()}
    cache = DynamicCache(config=models(family)[0].config)
    y = layer(x, cache=cache, **given)
    assert torch.equal(layer(x, **given), y)
    for row, bounds in enumerate(starts):
        for start, end in itertools.pairwise(bounds):
            alone = DynamicCache(config=models(family)[0].config)
            assert_close(y[row : row + 1, start:end], layer(x[row : row + 1, start:end], cache=alone))
        for of in ("conv_states", "recurrent_states"):
            got, want = (getattr(c.layers[layer.layer_idx], of)[0] for c in (cache, alone))
            assert_close(got[row : row + 1], want)


def test_packed_rows_have_gradients():
    layer, x = copy.deepcopy(mixer()), normal(1, N, 32)
    bounds, gradients = torch.tensor([0, 9, N]), []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = torch.cat([layer(leaf[:, :9]), layer(leaf[:, 9:])], dim=1) if gradients else layer(leaf, cu_seqlens=bounds)
        gradients.append(torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()]))
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want, 1e-4)


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
def test_steps_in_grad_mode(family):
    """Tokens after a prefill have gradients through the states, as one forward pass has them."""
    layer = mixer(family)
    x, gradients = normal(B, 8, 32), []
    for cuts in ((0, 8), (0, 5, 6, 7, 8)):
        leaf = x.clone().requires_grad_()
        cache = DynamicCache(config=models(family)[0].config)
        y = torch.cat([layer(leaf[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)], dim=1)
        gradients.append(torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()]))
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want, 1e-4)


@torch.no_grad()
def test_a_step_obeys_the_limits_as_a_prefill_does():
    layer = copy.deepcopy(mixer())
    layer.time_step_limit = (0.1, 0.15)
    x, cache = normal(B, 6, 32), DynamicCache(config=models("mamba2")[0].config)
    got = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(6)], dim=1)
    assert_close(got, layer(x))
    assert error(got, mixer()(x)) > 1e-2


@torch.no_grad()
def test_compiled_whole(tokens):
    """Prefill with and without a mask, and decoding, have one graph and the eager results."""
    ids, mask = tokens
    model = models("mamba2")[1]
    for given in ({}, {"attention_mask": mask}):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        kept = mask.bool() if given else slice(None)
        got, want = (m(ids, use_cache=False, **given).logits[kept] for m in (compiled, model))
        assert_close(got, want)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        model(ids, use_cache=True, cache=cache)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        logits = [m(ids[:, :1], use_cache=True, cache=c).logits for m, c in zip((compiled, model), caches, strict=True)]
        assert_close(*logits)


@torch.no_grad()
def test_a_patched_model_is_saved_copied_and_sent_as_it_was(tokens, tmp_path):
    ids, patched = tokens[0], models("bamba")[1]
    want = patched(ids).logits
    patched.save_pretrained(tmp_path)
    loaded = type(patched).from_pretrained(tmp_path).eval()
    assert not any(mamba2.is_patched(m) for m in loaded.modules()) and patch(loaded) == 2
    for other in (loaded, copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert torch.equal(other(ids).logits, want) and sum(map(mamba2.is_patched, other.modules())) == 2


def hooked(layer):
    """Wraps a layer as accelerate does to move it; returns the calls of the hook."""
    calls = []

    def forward(layer, *arguments, **options):
        calls.append(layer)
        return layer._old_forward(*arguments, **options)

    layer._old_forward = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(forward, layer), layer._old_forward)
    return calls


@torch.no_grad()
def test_hooks_around_a_layer_and_its_convolution_run(monkeypatch):
    layer, x = copy.deepcopy(mixer(which=0)), normal(1, 5, 32)
    calls, moves, ours = hooked(layer), [], []
    layer.conv1d._hf_hook = types.SimpleNamespace(
        pre_forward=lambda module: moves.append("to"), post_forward=lambda module, output: moves.append("from")
    )
    monkeypatch.setattr(mamba2, "mix", lambda *a, mix=mamba2.mix, **o: ours.append(a) or mix(*a, **o))
    for change, by_us in ((patch, 1), (unpatch, 1)):  # calls of the patched forward so far
        assert change(layer) == 1
        layer(x)
        assert len(ours) == by_us
    assert len(calls) == 2 and moves == ["to", "from"] * 2


def test_cuda_tensors_keep_the_package_where_it_is(monkeypatch):
    layer = mixer()
    kind, on_gpu, on_cpu = type(layer), *(types.SimpleNamespace(is_cuda=is_cuda) for is_cuda in (True, False))
    monkeypatch.setattr(kind, "_compute", lambda self, *inputs: "leetcore")
    monkeypatch.setattr(kind.original, "forward", lambda self, x, **options: "transformers")
    assert not kind.keeps_cuda and layer.forward(on_gpu) == "leetcore"
    monkeypatch.setattr(kind, "keeps_cuda", True)
    assert layer.forward(on_gpu) == "transformers" and layer.forward(on_cpu) == "leetcore"
    package = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert not mamba2._finds_mamba_ssm()
    package.mamba_chunk_scan_combined = compat.mamba_chunk_scan_combined
    assert not mamba2._finds_mamba_ssm()
    package.mamba_chunk_scan_combined = lambda: None
    assert mamba2._finds_mamba_ssm()


def test_leetcore_takes_cuda_tensors_if_asked(monkeypatch):
    layer = mixer()
    monkeypatch.setattr(type(layer), "keeps_cuda", True)
    assert unpatch(layer) == patch(layer, cuda=True) == 1 and not layer.keeps_cuda
    assert not copy.deepcopy(layer).keeps_cuda
    assert unpatch(layer) == patch(layer) == 1 and layer.keeps_cuda


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda m, layer: delattr(layer, "A_log"), "it has no A_log"),
        (lambda m, layer: m.delattr(transformers.Cache, "get_conv_state"), "Cache has no get_conv_state"),
        (lambda m, layer: m.setattr(type(layer), "forward", lambda self, x: x), "its forward takes no hidden_states"),
        (
            lambda m, layer: m.setattr(
                type(layer), "forward", lambda self, hidden_states, cache, attention_mask: self.use_bias
            ),
            "its forward reads use_bias, which leetcore does not know",
        ),
        (lambda m, layer: setattr(layer, "forward", lambda *x: x), "its forward has been replaced"),
        (lambda m, layer: setattr(layer, "activation", "gelu"), "its activation is 'gelu', not 'silu'"),
        (
            lambda m, layer: m.setattr(mamba2, "force_accelerate_hooks", None),
            "transformers.integrations.accelerate has no force_accelerate_hooks",
        ),
    ],
    ids=["parameter", "cache", "arguments", "attribute", "forward of one layer", "activation", "hooks"],
)
def test_another_version_of_the_layer_is_refused_before_anything_is_changed(monkeypatch, change, text):
    model = copy.deepcopy(models("mamba2")[0])
    first, last = mixers(model)
    change(monkeypatch, last)
    with pytest.raises(NotImplementedError, match=rf"^transformers {transformers.__version__}: expected .*but.*{text}"):
        patch(model)
    assert not mamba2.is_patched(first) and not mamba2.is_patched(last)


@torch.no_grad()
def test_wrong_inputs_of_a_patched_layer_are_refused():
    layer, x, cache = mixer(), normal(B, 5, 32), DynamicCache(config=models("mamba2")[0].config)
    for shape in ((B, 1, 5, 5), (B, 4), (3, 5)):
        with pytest.raises(ValueError, match=r"^attention_mask: expected shape \[2, 5\], or longer .*, got \["):
            layer(x, attention_mask=torch.ones(shape))
    sequences = torch.zeros(B, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^seq_idx: expected shape \[2, 5\], got \[2, 4\]"):
        layer(x, seq_idx=sequences[:, 1:])
    with pytest.raises(ValueError, match=r"^seq_idx: expected None with an attention_mask"):
        layer(x, seq_idx=sequences, attention_mask=torch.ones(B, 5))
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected a batch of 1 row, got 2"):
        layer(x, cu_seqlens=torch.tensor([0, 5]))
    layer(x, cache=cache)
    with pytest.raises(ValueError, match=r"^seq_idx: expected None where a cache continues earlier tokens"):
        layer(x, cache=cache, seq_idx=sequences)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match=r"^model: expected one .*, got Linear; the Mamba-2 layers .* Mamba2Mixer, Ba"):
        patch(torch.nn.Linear(2, 2))


# ---- the definition, and the functions of mamba_ssm and causal_conv1d


def definition(**given):
    """y and the last state of the definition in float64."""
    arrays = {n: t.detach().double().numpy() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    return tuple(map(torch.from_numpy, reference.ssd(**arrays)))


H, P, G, K = 4, 16, 2, 24
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3}


def scan_inputs(dtype=torch.float32, n=70, batch=B):
    x, z = (normal(batch, n, H, P, seed=s, dtype=dtype) for s in (1, 2))
    Bs, Cs = (normal(batch, n, G, K, seed=s, dtype=dtype) for s in (3, 4))
    return {
        "x": x,
        "dt": normal(batch, n, H, seed=5, dtype=dtype),
        "A": -normal(H, seed=6).exp(),
        "B": Bs,
        "C": Cs,
        "D": normal(H, seed=7),
        "z": z,
        "dt_bias": normal(H, seed=8),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("features", ["all", "none", "D per channel, limits"])
def test_the_scan_is_the_definition(dtype, features):
    given = scan_inputs(dtype)
    options, initial = {"dt_softplus": True}, normal(B, H, P, K, seed=9)
    if features == "none":
        for name in ("D", "z", "dt_bias"):
            del given[name]
        given["dt"] = given["dt"].abs()
        options = {}
    if features == "D per channel, limits":
        given["D"], options["dt_limit"] = normal(H, P, seed=7), (0.2, 0.9)
    y, state = compat.mamba_chunk_scan_combined(
        **given, chunk_size=16, initial_states=initial.to(dtype), return_final_states=True, **options
    )
    want, want_state = definition(**given, **options, initial_state=initial.to(dtype))
    assert y.dtype == dtype and state.dtype == torch.float32 and y.is_contiguous()
    assert_close(y, want, TOLERANCE[dtype])
    assert_close(state, want_state, TOLERANCE[dtype])
    alone = compat.mamba_chunk_scan_combined(**given, chunk_size=16, **options)
    assert_close(alone, definition(**given, **options)[0], TOLERANCE[dtype])


def test_packed_rows_of_the_scan():
    given = scan_inputs(n=12)
    initial, seq_idx = normal(B, H, P, K, seed=9), torch.tensor([[0] * 5 + [1] * 7, [3] * 12])
    y, state = compat.mamba_chunk_scan_combined(
        **given, chunk_size=8, seq_idx=seq_idx, initial_states=initial, return_final_states=True, dt_softplus=True
    )
    per_token, rest = ("x", "dt", "B", "C", "z"), {n: given[n] for n in ("A", "D", "dt_bias")}
    for row, start, end, state_before in ((0, 0, 5, initial[:1]), (0, 5, 12, None), (1, 0, 12, initial[1:])):
        part = {name: given[name][row : row + 1, start:end] for name in per_token}
        want, want_state = definition(**part, **rest, dt_softplus=True, initial_state=state_before)
        assert_close(y[row : row + 1, start:end], want)
        if end == 12:
            assert_close(state[row : row + 1], want_state)
    one = {name: given[name][:1] for name in per_token} | rest
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    varlen = compat.mamba_chunk_scan_combined(
        **one, chunk_size=8, cu_seqlens=bounds, dt_softplus=True, return_final_states=True, return_varlen_states=True
    )
    assert varlen[2].shape == (2, H, P, K) and torch.equal(varlen[1], varlen[2][1:])
    assert torch.equal(
        compat.mamba_chunk_scan_combined(**one, chunk_size=8, cu_seqlens=bounds, dt_softplus=True), varlen[0]
    )
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected start offsets with return_varlen_states, got None"):
        compat.mamba_chunk_scan_combined(**one, chunk_size=8, return_varlen_states=True)


def step_inputs(dtype=torch.float32, batch=3):
    given = {name: t[:, 0] if t.ndim > 2 else t for name, t in scan_inputs(dtype, 1, batch).items()}
    given["dt"] = given["dt"][..., None].expand(-1, -1, P)
    given["A"] = given["A"][:, None, None].expand(-1, P, K)
    given["D"], given["dt_bias"] = (given[name][:, None].expand(-1, P) for name in ("D", "dt_bias"))
    return given


def step_definition(given, state):
    sequence = {name: given[name][:, None] for name in ("x", "B", "C", "z")}
    per_head = {"dt": given["dt"][:, None, :, 0], "A": given["A"][:, 0, 0], "dt_bias": given["dt_bias"][:, 0]}
    y, S = definition(**sequence, **per_head, D=given["D"], dt_softplus=True, initial_state=state)
    return y[:, 0], S


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pool", [False, True])
def test_the_step_is_the_definition(dtype, pool):
    given, state = step_inputs(dtype), normal(5 if pool else 3, H, P, K, seed=9)
    slots = torch.tensor([4, 0, 2]) if pool else torch.arange(3)
    want, want_state = step_definition(given, state[slots])
    before, place = state.clone(), state.data_ptr()
    options = {"state_batch_indices": slots.int()} if pool else {}
    y = compat.selective_state_update(state, **given, dt_softplus=True, **options)
    assert y.dtype == dtype and state.data_ptr() == place
    assert_close(y, want, TOLERANCE[dtype])
    assert_close(state[slots], want_state, TOLERANCE[dtype])
    if pool:
        assert torch.equal(state[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("pool", [False, True])
def test_the_step_has_gradients_of_its_token(pool):
    given, state = step_inputs(), normal(5 if pool else 3, H, P, K, seed=9)
    slots = torch.tensor([4, 0, 2]) if pool else None
    plain = state.clone()
    with torch.no_grad():
        want = compat.selective_state_update(plain, **given, dt_softplus=True, state_batch_indices=slots)
    given["x"].requires_grad_()
    got = compat.selective_state_update(state, **given, dt_softplus=True, state_batch_indices=slots)
    assert_close(got.detach(), want)
    assert_close(state, plain)
    got.sum().backward()
    assert not state.requires_grad and given["x"].grad.norm() > 0


def test_tensors_of_mamba_1_are_refused():
    given, state = step_inputs(), normal(3, H, P, K)
    for name in ("dt", "A", "dt_bias"):
        with pytest.raises(ValueError, match=rf"^{name}: expected one value per head, expanded with stride 0"):
            compat.selective_state_update(state, **{**given, name: given[name].contiguous()})
    with pytest.raises(ValueError, match=r"^state: expected shape \[slots, H, P, K\] of Mamba-2, got \[3, 16, 24\]"):
        compat.selective_state_update(state[:, 0], **given)


def convolution(x, weight, bias=None, before=None, silu=True):
    """The convolution in float64; before has the inputs before x."""
    x, weight = x.detach().double(), weight.detach().double()
    width, n = weight.shape[1], x.shape[2]
    x = F.pad(x, (width - 1, 0)) if before is None else torch.cat([before.double(), x], dim=2)
    u = sum(weight[:, i, None] * x[:, :, i : i + n] for i in range(width))
    u = u if bias is None else u + bias[:, None]
    return F.silu(u) if silu else u


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_the_convolution_of_causal_conv1d(activation):
    x, weight, bias = normal(B, 12, 20, seed=1), normal(12, 4, seed=2), normal(12, seed=3)
    before, silu = normal(B, 12, 3, seed=4), activation is not None
    assert_close(compat.causal_conv1d_fn(x, weight, activation=activation), convolution(x, weight, None, None, silu))
    out = torch.empty(B, 12, 3)
    for place in (None, out):
        y, last = compat.causal_conv1d_fn(x, weight, bias, None, before, True, place, activation)
        assert_close(y, convolution(x, weight, bias, before, silu))
        assert torch.equal(last, x[:, :, -3:]) and (place is None or last is place)
    seq_idx = torch.tensor([[0] * 5 + [1] * 15, [2] * 20])
    y = compat.causal_conv1d_fn(x, weight, bias, seq_idx, activation=activation)
    assert_close(y[:1, :, 5:], convolution(x[:1, :, 5:], weight, bias, None, silu))
    assert_close(y[1:], convolution(x[1:], weight, bias, None, silu))
    with torch.no_grad():
        pool = torch.cat([normal(1, 12, 4, seed=5), before.new_zeros(B, 12, 4)])
        pool[1:, :, 1:] = before
        kept = pool[0].clone()
        y = compat.causal_conv1d_update(
            x[:, :, 0], pool, weight, bias, activation, conv_state_indices=torch.tensor([1, 2], dtype=torch.int32)
        )
        assert_close(y[..., None], convolution(x[:, :, :1], weight, bias, before, silu))
        assert torch.equal(pool[1:, :, 1:], torch.cat([before[:, :, 1:], x[:, :, :1]], dim=2))
        assert torch.equal(pool[0], kept)


def test_a_step_of_the_convolution_has_gradients():
    x, weight, state = normal(B, 12, 2, seed=1), normal(12, 4, seed=2), normal(B, 12, 4, seed=3)
    want = convolution(x, weight, None, state[:, :, 1:])
    weight.requires_grad_()
    y = compat.causal_conv1d_update(x, state, weight, activation="silu")
    assert_close(y.detach(), want)
    assert torch.equal(state[:, :, 2:], x) and torch.autograd.grad(y.sum(), weight)[0].norm() > 0


def test_wrong_inputs_of_the_convolution_are_refused():
    x, weight, state = normal(B, 12, 5), normal(12, 4), normal(B, 12, 4)
    with pytest.raises(ValueError, match=r"^activation: expected None.*, got 'gelu'"):
        compat.causal_conv1d_fn(x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"^seq_idx: expected None with initial_states or return_final_states"):
        compat.causal_conv1d_fn(x, weight, seq_idx=torch.zeros(B, 5, dtype=torch.int32), return_final_states=True)
    with pytest.raises(NotImplementedError, match=r"^cache_seqlens: expected None, got a tensor"):
        compat.causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(B, dtype=torch.int32))


@pytest.mark.parametrize("norm", [None, "before the gate", "after the gate"])
@pytest.mark.parametrize("mlp", [0, 6])
def test_the_layer_after_its_projection(norm, mlp):
    width, channels, n = H * P, H * P + 2 * G * K, 20
    zxbcdt = normal(B, n, 2 * mlp + width + channels + H, seed=1)
    weight, bias, dt_bias = normal(channels, 4, seed=2), normal(channels, seed=3), normal(H, seed=4)
    A, D, scale, out = (
        -normal(H, seed=5).exp(),
        normal(H, seed=6),
        normal(width, seed=7),
        normal(9, width + mlp, seed=8),
    )
    y, state = compat.mamba_split_conv1d_scan_combined(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        A,
        D,
        16,
        return_final_states=True,
        rmsnorm_weight=None if norm is None else scale,
        rmsnorm_eps=1e-5,
        outproj_weight=out,
        headdim=P,
        ngroups=G,
        norm_before_gate=norm == "before the gate",
    )
    gate, value, z, xBC, dt = zxbcdt.double().split([mlp, mlp, width, channels, H], dim=-1)
    x, Bs, Cs = convolution(xBC.transpose(1, 2), weight, bias).transpose(1, 2).split([width, G * K, G * K], dim=-1)
    heads = {"x": x.unflatten(-1, (H, P)), "B": Bs.unflatten(-1, (G, K)), "C": Cs.unflatten(-1, (G, K))}
    want, want_state = definition(**heads, dt=dt, A=A, D=D, dt_bias=dt_bias, dt_softplus=True)
    want = want.flatten(-2)
    if norm is None:
        want = want * F.silu(z)
    else:
        u = want if norm == "before the gate" else want * F.silu(z)
        groups = u.unflatten(-1, (G, -1))
        u = (groups * (groups.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * scale
        want = u * F.silu(z) if norm == "before the gate" else u
    if mlp:
        want = torch.cat([F.silu(gate) * value, want], dim=-1)
    assert_close(y, want @ out.double().T)
    assert_close(state, want_state)


def test_wrong_widths_of_the_layer_after_its_projection_are_refused():
    split = functools.partial(compat.mamba_split_conv1d_scan_combined, chunk_size=16, conv1d_bias=None)
    tensors = {"conv1d_weight": normal(20, 4), "dt_bias": normal(2), "A": -torch.ones(2), "D": normal(2)}
    with pytest.raises(ValueError, match=r"^headdim: expected the size of a head"):
        split(normal(1, 3, 30), **tensors)
    with pytest.raises(ValueError, match=r"^zxbcdt: expected 16 \+ 20 \+ 2 channels, or an even number more"):
        split(normal(1, 3, 39), **tensors, headdim=8)
    with pytest.raises(ValueError, match=r"^outproj_bias: expected None without outproj_weight, got a tensor"):
        split(normal(1, 3, 38), **tensors, headdim=8, outproj_bias=normal(2))


@pytest.fixture
def installed():
    compat.install()
    names = [name for name in sys.modules if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d")]
    yield
    for name in names:
        del sys.modules[name]


def test_programs_that_import_mamba_ssm_run_without_it(installed):
    compat.install()
    import mamba_ssm
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as same
    from mamba_ssm.modules.mamba2 import Mamba2
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rmsnorm_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

    assert mamba_ssm.Mamba2 is Mamba2 is compat.Mamba2 and RMSNorm is compat.RMSNormGated and same is causal_conv1d_fn
    functions = (causal_conv1d_fn, causal_conv1d_update, rmsnorm_fn, selective_state_update)
    for function in (*functions, mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined):
        assert function is getattr(compat, function.__name__)
    assert importlib.util.find_spec("mamba_ssm") and importlib.util.find_spec("mamba_ssm.ops.triton.ssd_combined")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")


def test_transformers_finds_the_functions(installed, monkeypatch, tokens):
    """Without patch: a model file that is imported after `install` computes with leetcore."""
    package = importlib.import_module("transformers.models.mamba2")
    monkeypatch.setattr(package, "modeling_mamba2", package.modeling_mamba2)
    monkeypatch.delitem(sys.modules, "transformers.models.mamba2.modeling_mamba2")
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    original, calls = models("mamba2")[0], []
    functions = sys.modules["leetcore.compat.mamba_ssm.functions"]
    for name in ("ssd", "ssd_step"):
        call = getattr(functions, name)
        monkeypatch.setattr(
            functions, name, lambda *a, _name=name, _call=call, **o: calls.append(_name) or _call(*a, **o)
        )
    model = module.Mamba2ForCausalLM(original.config).eval()
    model.load_state_dict(original.state_dict())
    given = {"max_new_tokens": 3, "do_sample": False, "attention_mask": tokens[1]}
    assert torch.equal(model.generate(tokens[0], **given), original.generate(tokens[0], **given))
    assert calls == ["ssd"] * 2 + ["ssd_step"] * 4
    losses = [m.train()(tokens[0], labels=tokens[0]).loss for m in (model, copy.deepcopy(original))]
    assert_close(*losses)
    assert len(calls) == 8


def test_an_installed_package_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
    with pytest.raises(RuntimeError, match=r"^mamba_ssm: expected a machine without this package, got an installed"):
        compat.install()
    assert "causal_conv1d" not in sys.modules


# ---- layers


def layer_of(options):
    torch.manual_seed(0)
    return layers.Mamba2(32, d_state=16, headdim=16, **options)


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "falcon_h1 with a norm"])
def test_weights_of_transformers_load(family):
    theirs = copy.deepcopy(mixer(family, 0))
    if hasattr(theirs, "mup_vector"):
        theirs.mup_vector, theirs.ssm_in_multiplier = torch.ones(()), 1.0
    norm_first = getattr(theirs.norm, "norm_before_gate", False)
    ours = layer_of({"ngroups": theirs.n_groups, "rmsnorm": family != "falcon_h1", "norm_before_gate": norm_first})
    ours.load_state_dict(theirs.state_dict(), strict="falcon" not in family)
    x = normal(B, N, 32)
    with torch.no_grad():
        assert_close(ours(x), theirs(x))


LAYERS = [
    {},
    {"ngroups": 2, "norm_before_gate": True, "bias": True},
    {"rmsnorm": False, "conv_bias": False, "d_conv": 3, "dt_limit": (0.01, 0.05)},
    {"D_has_hdim": True, "expand": 1},
]


@torch.no_grad()
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_a_sequence_its_pieces_and_its_tokens_agree(options):
    layer, x = layer_of(options), normal(B, N, 32)
    want, state = layer(x), layer.new_state(B)
    pieces = [layer(x[:, :2], state), layer(x[:, 2:30], state)]
    pieces += [layer.step(x[:, t], state)[:, None] for t in range(30, N)]
    assert_close(torch.cat(pieces, dim=1), want)
    mask = torch.ones(B, N + 9, dtype=torch.bool)
    mask[0, :9] = mask[1, 5:8] = mask[1, -6:] = False
    padded = torch.full((B, N + 9, 32), float("nan"))
    padded[mask] = x.flatten(0, 1)
    other = layer.new_state(B)
    assert_close(layer(padded, other, mask=mask)[mask], want.flatten(0, 1))
    assert_close(other.memory, state.memory)
    assert_close(other.conv, state.conv)
    assert torch.equal(state.select(torch.tensor([1, 1])).conv[0], state.conv[1])
    packed = layer.new_state(2)
    y = layer(torch.cat([x[:1], x[1:, :7]], dim=1), packed, torch.tensor([0, N, N + 7]))
    assert_close(y[:, :N], want[:1])
    assert_close(y[:, N:], want[1:, :7])
    assert_close(packed.memory[:1], state.memory[:1])


def test_a_layer_has_gradients_and_steps_have_none():
    layer, x = layer_of({}), normal(B, N, 32)
    state = layer.new_state(B)
    y = torch.cat([layer(x[:, :9], state), layer(x[:, 9:], state)], dim=1)
    want = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for got, gradient in zip(torch.autograd.grad(y.square().sum(), list(layer.parameters())), want, strict=True):
        assert_close(got, gradient, 1e-4)
    with pytest.raises(NotImplementedError):
        layer.step(x[:, 0], state.detach())
    loaded = layer_of({"bias": False})
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x), layer(x))


def test_a_new_layer_and_wrong_options(tmp_path):
    layer = layers.Mamba2(64, headdim=8, A_init_range=(2, 3), dt_min=0.01, dt_max=0.02)
    names = "in_proj.weight conv1d.weight conv1d.bias dt_bias A_log D norm.weight out_proj.weight"
    assert sorted(name for name, _ in layer.named_parameters()) == sorted(names.split())
    steps, rates = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert ((steps > 0.0099) & (steps < 0.0201)).all() and ((rates >= 2) & (rates <= 3)).all()
    torch.save(layer.new_state(1), tmp_path / "state")
    assert torch.load(tmp_path / "state").memory.shape == (1, 16, 8, 128)
    with pytest.raises(ValueError, match=r"^headdim: expected a divisor of expand \* d_model = 64, got 7"):
        layers.Mamba2(32, headdim=7)
    with pytest.raises(ValueError, match=r"^ngroups: expected a divisor of the number of heads, 4, got 3"):
        layers.Mamba2(32, headdim=16, ngroups=3)
    with pytest.raises(ValueError, match=r"^mask: expected None with cu_seqlens, got both"):
        layer(normal(1, 3, 64), None, torch.tensor([0, 3]), torch.ones(1, 3, dtype=torch.bool))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"rmsnorm": False}], ids=str)
def test_the_layer_of_mamba_ssm(options):
    """Its call, its states in inference_params, and its step, against the layer of leetcore."""
    ours = layer_of(options)
    theirs = compat.Mamba2(32, 16, headdim=16, layer_idx=3, chunk_size=16, conv_init=0.5, **options)
    assert theirs.conv1d.weight.abs().max() <= 0.5
    theirs.load_state_dict(ours.state_dict())
    x = normal(B, N, 32)
    assert torch.equal(theirs(x), ours(x)) and torch.equal(theirs(x.flatten(0, 1), N), ours(x).flatten(0, 1))
    parameters = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    pieces = [theirs(x[:, :30], inference_params=parameters)]
    for parameters.seqlen_offset in range(30, N):
        pieces.append(theirs(x[:, parameters.seqlen_offset, None], inference_params=parameters))
    assert_close(torch.cat(pieces, dim=1), ours(x))
    seq_idx = torch.zeros(B, N, dtype=torch.int32)
    seq_idx[0, 11:] = 1
    y = theirs(x, seq_idx=seq_idx)
    assert_close(y[1:], ours(x[1:]))
    assert_close(y[:1, 11:], ours(x[:1, 11:]))
    packed = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    theirs(x[:1], cu_seqlens=torch.tensor([0, 11, N]), inference_params=packed)
    state = ours.new_state(1)
    ours(x[:1, 11:], state)
    conv, memory = packed.key_value_memory_dict[3]
    assert_close(memory[1:], state.memory)
    assert_close(conv[1:, :, 1:], state.conv)


def test_options_of_mamba_ssm_that_are_not_served():
    with pytest.raises(NotImplementedError, match=r"^d_ssm: expected None or expand \* d_model = 64, got 32"):
        compat.Mamba2(32, d_ssm=32)
    with pytest.raises(NotImplementedError, match=r"^process_group: expected None, got one"):
        compat.Mamba2(32, process_group=object())
    assert compat.Mamba2(32, dtype=torch.bfloat16).in_proj.weight.dtype == torch.bfloat16


def test_arguments_have_upstreams_order():
    """The functions can be called as upstream's, by position too."""
    orders = {
        compat.mamba_chunk_scan_combined: "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens "
        "dt_softplus dt_limit return_final_states return_varlen_states state_dtype",
        compat.selective_state_update: "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
        compat.mamba_split_conv1d_scan_combined: "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size "
        "initial_states seq_idx dt_limit return_final_states activation rmsnorm_weight rmsnorm_eps outproj_weight "
        "outproj_bias headdim ngroups norm_before_gate state_dtype",
        compat.causal_conv1d_fn: "x weight bias seq_idx initial_states return_final_states final_states_out activation",
        compat.causal_conv1d_update: "x conv_state weight bias activation cache_seqlens conv_state_indices",
        compat.rmsnorm_fn: "x weight bias z eps group_size norm_before_gate",
    }
    for function, names in orders.items():
        code = function.__code__
        assert list(code.co_varnames[: code.co_argcount]) == names.split()
    assert importlib.import_module("leetcore.compat.causal_conv1d").causal_conv1d_fn is compat.causal_conv1d_fn
