"""leetcore.torch.integrations.transformers: a patched MiniMax says what the unpatched one says."""

import copy
import functools
import importlib
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from leetcore.torch.integrations import transformers as integration  # noqa: E402
from leetcore.torch.integrations.transformers import LightningAttention, patch, unpatch  # noqa: E402
from transformers import MiniMaxConfig, MiniMaxForCausalLM  # noqa: E402
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention  # noqa: E402

VOCABULARY, B, N, PADDED = 97, 2, 90, 37


@pytest.fixture(scope="module")
def models():
    """One of four layers, two of them linear, in float32: as transformers has it, and patched."""
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
    assert len(set(results[0][0, 60:].tolist())) > 4  # not one token for ever


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


def hooked(layer):
    """What accelerate does to a layer that it moves between devices; how often the hook was called."""
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
    for change, by_us in ((patch, 1), (unpatch, 1)):  # calls of ours so far
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


def test_the_name_of_the_cache_in_older_versions(models, tokens):
    layer = next(m for m in models[1].modules() if isinstance(m, integration.LightningAttention))
    cache, x = MiniMaxCache(), torch.randn(1, 5, 48)
    with torch.no_grad():
        _, state = layer(x, None, None, past_key_values=cache)
    assert cache.get_linear_cache(layer.layer_idx) is state
