"""leetcore.torch.integrations.transformers: a patched MiniMax gives the results of the original."""

import copy
import functools
import importlib
import pickle
import sys

import pytest
import torch
from leetcore import decay

transformers = pytest.importorskip("transformers")

from leetcore.torch.integrations.transformers import LightningAttention, patch, unpatch  # noqa: E402
from leetcore.torch.integrations.transformers import minimax as integration  # noqa: E402
from transformers import MiniMaxConfig, MiniMaxForCausalLM  # noqa: E402
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention  # noqa: E402

VOCABULARY, B, N, PADDED = 97, 2, 90, 37


@pytest.fixture(scope="module")
def models():
    """A MiniMax of four layers, two of them linear, in float32: original and patched."""
    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=32,
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.2,  # so that logits differ by more than rounding
    )
    original = MiniMaxForCausalLM(config).eval()
    patched = copy.deepcopy(original)
    assert patch(patched) == 2
    return original, patched


@pytest.fixture(scope="module")
def tokens():
    """Token numbers and the mask of a batch whose first sequence is padded on the left."""
    ids = torch.randint(3, VOCABULARY, (B, N), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :PADDED] = 0
    return ids.masked_fill(mask == 0, 0), mask


def assert_close(got, want):
    assert (got - want).norm() <= 2e-5 * want.norm()


def test_weights_are_kept(models):
    original, patched = (model.state_dict() for model in models)
    assert original.keys() == patched.keys() and all(torch.equal(original[name], patched[name]) for name in original)


@torch.no_grad()
def test_logits_with_left_padding(models, tokens):
    ids, mask = tokens
    want, got = (model(ids, attention_mask=mask).logits[mask.bool()] for model in models)
    assert_close(got, want)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(50,), (50, 51, 52), (20, 85)], ids=str)
def test_logits_of_a_prompt_in_pieces(models, tokens, cuts):
    ids, mask = tokens
    want, pieces, cache = models[0](ids, attention_mask=mask).logits, [], MiniMaxCache()
    for start, end in zip((0, *cuts), (*cuts, N), strict=True):
        given = {"attention_mask": mask[:, :end], "use_cache": True, "cache": cache}
        pieces.append(models[1](ids[:, start:end], **given).logits)
    assert_close(torch.cat(pieces, dim=1)[mask.bool()], want[mask.bool()])
    assert all(state.dtype == torch.float32 for state in cache.linear_cache if len(state))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampled", "sampled beams", "two of three beams"],
)
def test_generate_gives_the_same_tokens(models, tokens, options):
    ids, mask = tokens
    given = {"attention_mask": mask[:, :60], "max_new_tokens": 10, "do_sample": False, **options}
    results = []
    for model in models:
        torch.manual_seed(0)
        results.append(model.generate(ids[:, :60], **given))
    assert torch.equal(*results)
    assert len(set(results[0][0, 60:].tolist())) > 4  # the model does not repeat one token


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(models, tokens, checkpointing):
    ids, mask = tokens
    if checkpointing:
        models = models[0], copy.deepcopy(models[1]).train()
        models[1].activation_checkpointing_enable()
    losses = [model(ids, attention_mask=mask, labels=ids).loss for model in models]
    assert_close(losses[1].detach(), losses[0].detach())
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if "qkv_proj" in name:
            want, got = (
                torch.autograd.grad(loss, w, retain_graph=True)[0] for loss, w in zip(losses, (p, q), strict=True)
            )
            assert (got - want).norm() <= 1e-4 * want.norm()


@torch.no_grad()
def test_bfloat16_keeps_states_and_decays_in_float32(models):
    layers = [next(m for m in model.modules() if isinstance(m, MiniMaxLightningAttention)) for model in models]
    layers = [copy.deepcopy(layer).bfloat16() for layer in layers]
    x = torch.randn(1, 600, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    y, state = copy.deepcopy(layers[1]).float()(x.float(), None, None)
    errors = []
    for layer in layers:
        rounded, rounded_state = layer(x, None, None)
        assert rounded.dtype == torch.bfloat16
        errors.append([((a - b).norm() / b.norm()).item() for a, b in ((rounded, y), (rounded_state, state))])
    assert rounded_state.dtype == torch.float32
    assert errors[1][0] <= errors[0][0] and errors[1][1] <= errors[0][1] / 2


@torch.no_grad()
def test_a_cache_of_the_unpatched_model_continues(models, tokens):
    ids, _ = tokens
    want, cache = models[0](ids).logits[:, 60:], MiniMaxCache()
    models[0](ids[:, :60], use_cache=True, cache=cache)
    assert_close(models[1](ids[:, 60:], use_cache=True, cache=cache).logits, want)


def test_unpatch(models):
    model = copy.deepcopy(models[1])
    layers = [m for m in model.modules() if isinstance(m, MiniMaxLightningAttention)]
    assert {type(m) for m in layers} == {LightningAttention}
    assert unpatch(model) == 2 and {type(m) for m in layers} == {MiniMaxLightningAttention} and unpatch(model) == 0
    assert not any("log_decay" in vars(m) | m._buffers for m in layers)


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
@pytest.mark.parametrize("removed", [False, True])
def test_hooks_around_a_layer_stay_around_it(models, monkeypatch, removed):
    layer = copy.deepcopy(next(m for m in models[0].modules() if isinstance(m, MiniMaxLightningAttention)))
    calls, x = hooked(layer), torch.randn(1, 5, 48)
    if removed:
        layer.forward = layer.__dict__.pop("_old_forward")
    ours, linear_attention = [], integration.linear_attention
    monkeypatch.setattr(integration, "linear_attention", lambda *a, **o: ours.append(a) or linear_attention(*a, **o))
    for change, by_us in ((patch, 1), (unpatch, 1)):  # calls of the patched forward so far
        assert change(layer) == 1
        layer(x, None, None)
        assert len(ours) == by_us
    assert len(calls) == (0 if removed else 2)


def test_a_version_without_minimax_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.minimax.modeling_minimax", None)
    monkeypatch.delitem(sys.modules, integration.__name__)
    with pytest.raises(ImportError, match=rf"expected a version with MiniMaxLight.*, got {transformers.__version__}$"):
        importlib.import_module(integration.__name__)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match=r"^model: expected one with layers MiniMaxLightningAttention, got Linear"):
        patch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda m, layer: delattr(layer, "output_gate"), "it has no output_gate"),
        (lambda m, layer: layer.slope_rate.mul_(1.5), r"its slope_rate of layer 1 is not leetcore\.decay\.minimax"),
        (lambda m, layer: m.delattr(MiniMaxCache, "set_linear_cache"), "MiniMaxCache has no set_linear_cache"),
        (
            lambda m, layer: m.setattr(MiniMaxLightningAttention, "forward", lambda self, x: x),
            "its forward takes no cache",
        ),
        (lambda m, layer: setattr(layer, "forward", lambda *x: x), "its forward has been replaced"),
    ],
    ids=["module", "decay", "cache", "forward", "forward of one layer"],
)
def test_another_version_of_the_layer_is_refused_before_anything_is_changed(models, monkeypatch, change, text):
    model = copy.deepcopy(models[0])
    layer = next(m for m in model.modules() if isinstance(m, MiniMaxLightningAttention))
    change(monkeypatch, layer)
    with pytest.raises(NotImplementedError, match=rf"^transformers {transformers.__version__}: .*{text}"):
        patch(model)
    assert type(layer) is MiniMaxLightningAttention


@pytest.mark.parametrize("name", ["past_key_values", "past_key_value"])
def test_the_name_of_the_cache_in_older_versions(models, name):
    layer = next(m for m in models[1].modules() if isinstance(m, integration.LightningAttention))
    cache, x = MiniMaxCache(), torch.randn(1, 5, 48)
    with torch.no_grad():
        _, state = layer(x, None, None, **{name: cache})
    assert cache.get_linear_cache(layer.layer_idx) is state


def test_patching_twice_is_patching_once(models):
    model = copy.deepcopy(models[0])
    assert patch(model) == patch(model) == 2 and unpatch(model) == 2


@torch.no_grad()
def test_compiled_whole(models, tokens):
    """Prefill with and without a mask, and decoding, have one graph and the eager results."""
    ids, mask = tokens
    model = models[1]
    for given in ({}, {"attention_mask": mask}):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        kept = mask.bool() if given else slice(None)
        assert_close(
            compiled(ids, use_cache=False, **given).logits[kept], model(ids, use_cache=False, **given).logits[kept]
        )
    caches = [MiniMaxCache(), MiniMaxCache()]
    for cache in caches:
        model(ids, attention_mask=mask, use_cache=True, cache=cache)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    longer = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    given = {"attention_mask": longer, "use_cache": True}
    logits = [m(ids[:, :1], **given, cache=cache).logits for m, cache in zip((compiled, model), caches, strict=True)]
    assert_close(*logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize(
    "shown",
    [range(7, N), range(N - 30), [*range(9), *range(40, 60), *range(61, N)], range(N)],
    ids=["left", "right", "middle", "none"],
)
@pytest.mark.parametrize("cuts", [(), (50,), (30, 35)], ids=str)
def test_states_are_those_of_the_prompts_tokens(models, shown, dtype, cuts):
    layer = next(m for m in models[1].modules() if isinstance(m, LightningAttention))
    x = torch.randn(B, N, 48, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(B, N, dtype=dtype)
    mask[:, list(shown)] = 1
    y, state = layer(x[:, list(shown)], None, None)
    cache, parts = MiniMaxCache(), []
    for start, end in zip((0, *cuts), (*cuts, N), strict=True):
        parts.append(layer(x[:, start:end], None, mask[:, :end], cache=cache)[0])
    assert_close(torch.cat(parts, dim=1)[:, list(shown)], y)
    assert_close(cache.get_linear_cache(layer.layer_idx), state)


@torch.no_grad()
def test_masks_that_are_refused(models):
    layer = next(m for m in models[1].modules() if isinstance(m, LightningAttention))
    for shape in ((B, 1, 5, 5), (B, 4), (3, 5)):
        with pytest.raises(ValueError, match=r"^attention_mask: expected shape \[2, 5\], or longer .*, got \["):
            layer(torch.randn(B, 5, 48), None, torch.ones(shape))


def small(layer_types, layers=4):
    return MiniMaxConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=layer_types,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("back", [False, True])
def test_rounded_slopes_are_recognised_and_decays_exact(dtype, back):
    """The last layer's slopes are subnormal in float16; a cast patched model keeps its decays."""
    model = MiniMaxForCausalLM(small(["full_attention"] * 3 + ["linear_attention"]))
    layer = model.model.layers[3].self_attn
    want = decay.minimax(8, 3, 4)
    model.to(dtype)
    if back:
        model.float()
    assert patch(model) == 1
    for cast in (model, model.half(), model.bfloat16(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        log_decay = cast.model.layers[3].self_attn.log_decay
        assert log_decay.dtype == torch.float32 and log_decay.numpy().tolist() == want.tolist()
    assert "log_decay" not in "".join(layer.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_layer_with_one_less_in_its_factor(dtype):
    """A later transformers divides by layers - 1. Its slopes decide the decay, not its version."""
    model = MiniMaxForCausalLM(small(["linear_attention"] * 3, 3))
    for layer in (x.self_attn for x in model.model.layers):
        slopes = 2.0 ** -torch.arange(1, 9, dtype=torch.float64) * (1 - layer.layer_idx / 2 + 1e-5)
        layer.slope_rate.copy_(slopes[:, None, None])
        layer.slopes = slopes
    assert patch(model.to(dtype)) == 3
    for layer in (x.self_attn for x in model.model.layers):
        torch.testing.assert_close(layer.log_decay.double(), -layer.slopes, rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_model_from_the_device_meta(models, tokens):
    with torch.device("meta"):
        model = MiniMaxForCausalLM(models[0].config)
    assert patch(model) == 2
    model.load_state_dict(models[0].state_dict(), assign=True)
    model.model.rotary_emb = copy.deepcopy(models[0].model.rotary_emb)
    model.eval()
    assert torch.equal(model(tokens[0]).logits, models[1](tokens[0]).logits)


@torch.no_grad()
def test_a_patched_model_is_saved_as_it_was(models, tokens, tmp_path):
    models[1].save_pretrained(tmp_path)
    loaded = MiniMaxForCausalLM.from_pretrained(tmp_path).eval()
    assert not any(isinstance(m, LightningAttention) for m in loaded.modules()) and patch(loaded) == 2
    assert torch.equal(loaded(tokens[0]).logits, models[1](tokens[0]).logits)
