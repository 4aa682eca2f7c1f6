"""Which layers stay full: attention against dense probabilities, searches against losses that are known."""

import copy
import importlib
import itertools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import swaa_flex
from swaa_flex import ConfigError, SWAAConfig
from swaa_flex.analysis import AnswerLoss, LayerChoice, evaluations, greedy, lazy, mass_outside, sensitivity
from swaa_flex.hf.attention import attention_forward
from swaa_flex.hf.config import set_recipe
from swaa_flex.masks import causal, sinks, window

module = importlib.import_module("swaa_flex.analysis.lazy")  # the package has a function of that name

CONFIG = SWAAConfig(sliding_window=8, sink_tokens=2, full_attention_layers="1::2", dense_tail=4)
LAYERS = 4


@pytest.fixture
def model():
    return tiny("llama")


# --- what layers look at -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "cohere2"])
@pytest.mark.parametrize(("near", "first", "rows"), [(8, 2, 1), (8, 0, 16), (30, 5, 16), (1, 69, 200), (60, 9, 64)])
def test_mass_outside_is_that_of_the_dense_probabilities(family, near, first, rows, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)  # the last block is ragged
    model = tiny(family)
    if family != "gpt_oss":  # whose experts cannot
        model.double()
    ids = torch.randint(3, 99, (2, 71))
    found = mass_outside(model, ids, window=near, sinks=first, rows=rows)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    q, kv = torch.arange(71)[:, None], torch.arange(71)
    outside = (q - kv >= near) & (kv >= first)
    expected = [(weights.double() * outside).sum(-1)[:, :, -rows:].mean().item() for weights in attentions]
    assert found == pytest.approx(expected, abs=1e-6)  # some families compute their softmax in float32
    assert max(expected) > 0


def test_grouped_heads_meet_their_own_keys_in_float64(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 50)
    query, key = torch.randn(2, 6, 7, 16).double(), torch.randn(2, 2, 120, 16).double()
    visible, near = causal() & window(90), window(10) | sinks(3)
    found = module._mass_outside(query, key, visible, near, scaling=0.7, softcap=3.0)
    scores = 3 * torch.tanh(query @ key.repeat_interleave(3, 1).transpose(-1, -2) * 0.7 / 3)
    q, kv = torch.arange(113, 120)[:, None], torch.arange(120)
    scores = scores.masked_fill((kv > q) | (q - kv >= 90), -torch.inf)
    expected = (scores.softmax(-1) * ((q - kv >= 10) & (kv >= 3))).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_more_scores_than_rows_times_a_block_exist_at_a_time():
    heads, rows, length = 4, 64, 8 * module.BLOCK
    query, key = torch.randn(1, heads, rows, 8), torch.randn(1, 2, length, 8)
    with Largest() as largest:
        module._mass_outside(query, key, causal(), window(128) | sinks(16))
    assert heads * rows * module.BLOCK == largest.numel


def test_measuring_a_model_never_holds_the_square_of_the_length():
    model, length = tiny("llama", num_hidden_layers=2, max_position_embeddings=8192), 6144
    ids = torch.randint(3, 99, (1, length))
    with Largest() as largest:
        found = mass_outside(model, ids, window=128, sinks=16)
    assert largest.numel < length**2 / 4
    assert all(0 < mass < 1 for mass in found)


def test_lazy_keeps_the_layers_full_that_look_far_in_all_prompts(model):
    prompts = [torch.randint(3, 99, (length,)).tolist() for length in (60, 90)]
    choice = lazy(model, prompts, CONFIG, 2, rows=16)
    each = [mass_outside(model, torch.tensor([prompt]), window=8, sinks=2, rows=16) for prompt in prompts]
    mean = [(a + b) / 2 for a, b in zip(*each, strict=True)]
    assert choice.scores == pytest.approx(mean)
    farthest, second = sorted(range(LAYERS), key=lambda layer: -mean[layer])[:2]
    assert choice.order == (farthest, second)
    full = sorted(choice.order)
    assert choice.config == SWAAConfig(sliding_window=8, sink_tokens=2, full_attention_layers=full, dense_tail=4)


def test_uniform_attention_has_the_share_of_keys_outside(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    found = mass_outside(model, torch.randint(3, 99, (1, 50)), window=8, sinks=2, rows=1)
    assert found[0] == pytest.approx((50 - 8 - 2) / 50)


# --- what windows cost -------------------------------------------------------------------------------------


class KnownLoss:
    """A loss that is looked up by the full layers of the model, and counted."""

    def __init__(self, of, fail_at=None):
        self.of, self.fail_at, self.asked = of, fail_at, []

    def __call__(self, model):
        assert not model.training and not torch.is_grad_enabled()
        assert model.config._attn_implementation == "swaa_flex"
        full = tuple(model.config.swaa["full_attention_layers"])
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(full)
        return self.of(full)


def either_of_two(full):
    """Layer 0 helps by itself, 1 and 2 do the same, 3 does nothing."""
    return 10.0 - 3.0 * (0 in full) - 4.0 * (1 in full or 2 in full)


def test_sensitivity_is_the_rise_of_the_loss_if_one_layer_slides(model):
    loss = KnownLoss(either_of_two)
    choice = sensitivity(model, loss, CONFIG, 1)
    assert choice.scores == (3.0, 0.0, 0.0, 0.0)
    assert choice.order == (0,)
    assert choice.config.full_attention_layers == (0,)
    assert loss.asked[0] == (0, 1, 2, 3)
    assert sorted(loss.asked[1:]) == sorted(itertools.combinations(range(4), 3))
    assert len(loss.asked) == evaluations("sensitivity", LAYERS, 1)


def test_greedy_sees_what_layers_do_together(model):
    loss = KnownLoss(either_of_two)
    choice = greedy(model, loss, CONFIG, 2)
    assert choice.order == (1, 0)
    assert choice.scores == (3.0, 4.0, 0.0, 0.0)
    assert choice.config == SWAAConfig(sliding_window=8, sink_tokens=2, full_attention_layers=[0, 1], dense_tail=4)
    assert loss.asked[0] == ()
    assert len(loss.asked) == len(set(loss.asked)) == evaluations("greedy", LAYERS, 2) == 1 + 4 + 3


@pytest.mark.parametrize("search", [sensitivity, greedy])
@pytest.mark.parametrize("layer", [1, 2])
def test_the_one_layer_that_matters_is_found(search, layer, model):
    with torch.no_grad():  # of the others, next to nothing reaches the output
        for index, block in enumerate(model.model.layers):
            block.self_attn.o_proj.weight *= 1.0 if index == layer else 0.01
    ids = torch.randint(3, 99, (1, 80))
    with torch.no_grad():
        swaa_flex.restore(model)
        full = model(ids).logits

    def distance(model):
        with swaa_flex.prompt(72):
            return (model(ids).logits - full).square().mean().item()

    choice = search(model, distance, CONFIG, 1)
    assert choice.order == (layer,)
    assert choice.scores[layer] > 100 * max(score for i, score in enumerate(choice.scores) if i != layer) > 0


@pytest.mark.parametrize(("search", "stops_after"), [(sensitivity, 0), (sensitivity, 3), (greedy, 1), (greedy, 6)])
def test_an_interrupted_search_goes_on_and_measures_nothing_twice(search, stops_after, model, tmp_path):
    whole = search(model, KnownLoss(either_of_two), CONFIG, 2)
    first, second = KnownLoss(either_of_two, fail_at=stops_after), KnownLoss(either_of_two)
    path = tmp_path / "folder" / "losses.json"
    with pytest.raises(KeyboardInterrupt):
        search(model, first, CONFIG, 2, path=path)
    assert search(model, second, CONFIG, 2, path=path) == whole
    asked = first.asked + second.asked
    assert len(first.asked) == stops_after
    assert len(asked) == len(set(asked)) == evaluations(search.__name__, LAYERS, 2)
    third = KnownLoss(either_of_two)
    assert search(model, third, CONFIG, 2, path=path) == whole
    assert third.asked == []


@pytest.mark.parametrize("search", [sensitivity, greedy])
def test_a_second_search_is_refused_while_one_writes_its_losses(search, model, tmp_path):
    path, known, refused = tmp_path / "losses.json", KnownLoss(either_of_two), []

    def meanwhile(asked):
        with pytest.raises(ConfigError, match=r"losses\.json: another run is writing it"):
            greedy(copy.deepcopy(asked), other_loss, CONFIG, 1, path=path)
        refused.append(asked)
        return known(asked)

    search(model, meanwhile, CONFIG, 2, path=path)
    assert (
        len(refused)
        == evaluations(search.__name__, LAYERS, 2)
        == len(json.loads(path.read_text())["loss by full layers"])
    )
    assert list(tmp_path.iterdir()) == [path]


def test_a_larger_budget_goes_on_from_a_smaller_one(model, tmp_path):
    small = greedy(model, KnownLoss(either_of_two), CONFIG, 1, path=tmp_path / "losses.json")
    loss = KnownLoss(either_of_two)
    large = greedy(model, loss, CONFIG, 3, path=tmp_path / "losses.json")
    assert large.order[:1] == small.order
    assert len(loss.asked) == evaluations("greedy", LAYERS, 3) - evaluations("greedy", LAYERS, 1)


def other_loss(model):
    return 1.0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"config": SWAAConfig(sliding_window=9, sink_tokens=2, dense_tail=4)}, "differs in config"),
        ({"loss": other_loss}, "differs in loss"),
        ({"seed": 1}, "differs in weights"),
    ],
)
def test_losses_of_another_search_are_refused(changed, named, model, tmp_path):
    path = tmp_path / "losses.json"
    sensitivity(model, KnownLoss(either_of_two), CONFIG, 2, path=path)
    before = path.read_bytes()
    if "seed" in changed:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(ConfigError, match=named):
        sensitivity(model, changed.get("loss", KnownLoss(either_of_two)), changed.get("config", CONFIG), 2, path=path)
    assert path.read_bytes() == before


def test_the_full_layers_of_the_given_configuration_do_not_count(model, tmp_path):
    path = tmp_path / "losses.json"
    first = sensitivity(model, KnownLoss(either_of_two), CONFIG, 2, path=path)
    other = SWAAConfig(**CONFIG.to_dict() | {"full_attention_layers": [3]})
    assert sensitivity(model, KnownLoss(either_of_two), other, 2, path=path) == first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3, "loss by full layers": {}}', '{"settings": {}}'])
def test_a_file_that_holds_no_losses_is_refused(text, model, tmp_path):
    path = tmp_path / "losses.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"losses\.json.*name another file"):
        greedy(model, other_loss, CONFIG, 2, path=path)


def test_the_loss_of_answers_is_their_cross_entropy(model):
    pairs = [(torch.randint(3, 99, (n,)).tolist(), torch.randint(3, 99, (m,)).tolist()) for n, m in ((40, 5), (33, 1))]
    swaa_flex.adapt(model, "full")
    with torch.no_grad():
        losses = []
        for asked, answer in pairs:
            logits = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1].double()
            losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
        assert AnswerLoss(pairs)(model) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    texts = [[*asked, *answer] for asked, answer in pairs]
    assert AnswerLoss.of_texts(texts, 5).pairs == [(text[:-5], text[-5:]) for text in texts]


def test_answers_are_read_as_generated_ones():
    # One layer: rows of the prompt reach the answer as keys alone, and the last of them is the dense tail.
    model, text = tiny("llama", num_hidden_layers=1), torch.randint(3, 99, (60,)).tolist()
    loss = AnswerLoss([(text[:40], text[40:])])
    with torch.no_grad():
        full = loss(swaa_flex.adapt(model, "full"))
        sees = SWAAConfig(sliding_window=4, sink_tokens=0, full_attention_layers=(), dense_tail=1)
        assert loss(swaa_flex.adapt(model, sees)) == pytest.approx(full, rel=1e-5)
        slides = SWAAConfig(**sees.to_dict() | {"full_attention_decode": False})
        assert loss(swaa_flex.adapt(model, slides)) != pytest.approx(full, rel=1e-4)


def test_a_batch_of_answers_has_the_loss_of_its_pairs(model):
    pairs = [(torch.randint(3, 99, (n,)).tolist(), torch.randint(3, 99, (m,)).tolist()) for n, m in ((40, 5), (33, 1))]
    swaa_flex.adapt(model, CONFIG)
    with torch.no_grad():
        alone = AnswerLoss(pairs)(model)
        for batch_size in (2, 3):
            assert AnswerLoss(pairs, batch_size)(model) == pytest.approx(alone, rel=1e-5)


def test_other_answers_have_another_fingerprint():
    pairs = [([1, 2, 3], [4]), ([1, 2], [3, 4])]
    assert len({AnswerLoss([pair]).fingerprint for pair in pairs}) == 2
    assert AnswerLoss([(range(1, 4), (4,))]).fingerprint == AnswerLoss(pairs[:1]).fingerprint


# --- the model afterwards ----------------------------------------------------------------------------------


def measure_attention(model):
    mass_outside(model, torch.randint(3, 99, (1, 30)), window=8, sinks=2)


def measure_losses(model):
    sensitivity(model, AnswerLoss([([5] * 30, [6])]), CONFIG, 1)


def fail(model):
    sensitivity(model, KnownLoss(either_of_two, fail_at=2), CONFIG, 1)


@pytest.mark.parametrize("measure", [measure_attention, measure_losses, fail])
@pytest.mark.parametrize(
    ("implementation", "swaa"), [("sdpa", None), ("eager", CONFIG), ("swaa_flex", None), ("swaa_flex", CONFIG)]
)
def test_the_model_is_as_it_was(measure, implementation, swaa, model):
    swaa_flex.restore(model)
    model.set_attn_implementation(implementation)
    set_recipe(model.config, swaa)  # without the warning that `eager` does not run it
    model.train()
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    try:
        measure(model)
    except KeyboardInterrupt:
        assert measure is fail
    assert model.config._attn_implementation == implementation
    assert model.config.swaa == (None if swaa is None else swaa.to_dict())
    assert [part.training for part in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert "forward" not in vars(model)
    assert model.get_decoder().config._attn_implementation == implementation


def test_the_registered_attention_is_put_back_after_an_error(model, monkeypatch):
    interface = sys.modules["transformers"].AttentionInterface()
    measure_attention(model)
    assert interface["swaa_flex"] is attention_forward

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(module, "_mass_outside", broken)
    with pytest.raises(RuntimeError, match="broken"):
        measure_attention(model)
    assert interface["swaa_flex"] is attention_forward


# --- what cannot be chosen ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 4, -1, 1.0, True])
@pytest.mark.parametrize("method", [lazy, sensitivity, greedy])
def test_a_budget_that_leaves_no_choice_is_refused(budget, method, model):
    calibration = [[5] * 30] if method is lazy else other_loss
    with pytest.raises(ConfigError, match=r"budget=.*from 1 to 3"):
        method(model, calibration, CONFIG, budget)


@pytest.mark.parametrize("method", [lazy, sensitivity, greedy])
def test_a_configuration_without_a_window_is_refused(method, model):
    calibration = [[5] * 30] if method is lazy else other_loss
    with pytest.raises(ConfigError, match="sliding_window=None"):
        method(model, calibration, swaa_flex.recipes.get("full"), 2)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda model: lazy(model, [], CONFIG, 2), "at least one prompt"),
        (lambda model: lazy(model, [[5] * 10], CONFIG, 2), "10 tokens, all within 2 sinks and a window of 8"),
        (lambda model: lazy(model, [[5] * 30], CONFIG, 2, rows=0), "rows=0: expected at least one"),
        (lambda model: greedy(model, lambda model: float("nan"), CONFIG, 2), r"nan with full layers \[\]"),
        (lambda model: evaluations("greddy", 4, 2), "did you mean 'greedy'"),
        (lambda model: AnswerLoss([]), "at least one pair"),
        (lambda model: AnswerLoss([([1], [])]), "neither of them empty"),
        (lambda model: AnswerLoss([([1], [2])], 0), "batch_size=0: expected at least 1"),
        (lambda model: AnswerLoss.of_texts([[1, 2]], 2), "neither of them empty"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, problem, model):
    with pytest.raises(ConfigError, match=problem):
        call(model)


# --- what is returned --------------------------------------------------------------------------------------

CHOICE = LayerChoice.of_largest("lazy", "mass", [0.1, 0.3, 0.2, 0.3], CONFIG, 3)


def test_the_largest_scores_are_chosen_and_of_equal_ones_the_earlier():
    assert CHOICE.order == (1, 3, 2)
    assert CHOICE.config.full_attention_layers == (1, 2, 3)
    assert LayerChoice.of_largest("lazy", "mass", [0.1, 0.3, 0.2, 0.3], CONFIG, 1).order == (1,)


def test_a_choice_as_json_says_all_of_it():
    read = json.loads(CHOICE.to_json())
    config = SWAAConfig.from_dict(read.pop("config"))
    read = {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
    assert LayerChoice(**read, config=config) == CHOICE


def test_the_chart_has_a_bar_per_layer_and_tells_full_layers_apart(tmp_path):
    pytest.importorskip("matplotlib")
    figure = CHOICE.draw(tmp_path / "layers.png")
    full, sliding = figure.axes[0].containers
    assert [(bar.get_center()[0], bar.get_height()) for bar in full] == [(1, 0.3), (3, 0.3), (2, 0.2)]
    assert [(bar.get_center()[0], bar.get_height()) for bar in sliding] == [(0, 0.1)]
    assert full[0].get_facecolor() != sliding[0].get_facecolor()
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_chart_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'swaa-flex\[plot\]'"):
        CHOICE.draw()
