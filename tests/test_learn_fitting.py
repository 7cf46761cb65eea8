"The loop: parts of a batch, a batch that memory does not hold, early stops, weights of classes, what a checkpoint holds."
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cvops_wb.core.errors import WrongUsage
from cvops_wb.learn.fitting import NoMemory, NotFinite, Run, Step, fit
from cvops_wb.learn.learners import Learner, LearnSpec
from cvops_wb.learn.learners.checkpoints import Checkpoints, read_checkpoint
from cvops_wb.learn.learners.classification import ClassificationLearner, FitSpec
from cvops_wb.learn.learners.optimizers import SCHEDULES, rate
from cvops_wb.learn.loading import Pixels
from cvops_wb.learn.networks import build_network

SPEC = FitSpec(epochs=2, batch=16, min_steps=3, size=32, start_size=32, predict_size=32, every=1, mix_chance=0.)


def make(batch_norm: bool = True, count: int = 48, **changes) -> ClassificationLearner:
    "A learner of three colours."
    torch.manual_seed(0)
    labels, images = np.arange(count) % 3, np.random.default_rng(0).integers(0, 90, (count, 40, 40, 3)).astype(np.uint8)
    images[np.arange(count), :, :, labels] += 110
    pixels = Pixels(pd.Index([str(k) for k in range(count)]), images)
    rows = pd.DataFrame({"id": pixels.ids})
    material = SimpleNamespace(rows=rows, targets=labels, held=rows[:12], held_targets=labels[:12], pixels=pixels, exact=pixels, size=32)
    network = build_network("small_resnet:8", 3, 32)
    if not batch_norm:
        for name, module in list(network.named_modules()):
            if isinstance(module, torch.nn.BatchNorm2d): network.get_submodule(name.rpartition(".")[0])[int(name.rpartition(".")[2])] = torch.nn.Identity()
    return ClassificationLearner(network, material, replace(SPEC, half=False, **changes))


def hang(learner, wanted):
    "Have the network's forward raise, as an allocator does, where `wanted(calls, images)`; counts the batches that came through."
    ask, seen = learner.network.features, []
    def features(images):
        if wanted(len(seen), len(images)): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        seen.append(len(images))
        return ask(images)
    learner.look = features
    return seen


def weights(learner) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in learner.network.parameters()])


def test_parts_make_the_step_of_the_whole(monkeypatch):
    "Without batch norm and augmentation, a batch in parts moves the weights as the whole does."
    monkeypatch.setattr(ClassificationLearner, "views", lambda self, index, progress: (self.fetch(index).float()[..., :32, :32]/255, self.targets(index)))
    one, four = (make(batch_norm=False, accumulate=n) for n in (1, 4))
    before = weights(one)
    assert torch.equal(before, weights(four))
    for learner in (one, four): Step(learner).take(torch.arange(16), .5)
    assert (weights(one) - before).abs().max() > 1e-3
    torch.testing.assert_close(weights(one), weights(four), atol=1e-4, rtol=1e-3)


def test_a_batch_that_memory_does_not_hold_is_halved_once(capsys):
    learner = make()
    seen = hang(learner, lambda calls, images: images > 8)
    reports = []
    fit(learner, reports.append)
    assert set(seen) == {8} and len(reports) == 2 and capsys.readouterr().out.count("in 2 parts") == 1


def test_half_of_it_does_not_fit_either():
    learner = make()
    hang(learner, lambda calls, images: calls > 1)
    with pytest.raises(NoMemory, match="half of it neither"): fit(learner, lambda report: None)


def test_other_errors_are_not_taken_for_memory():
    learner = make()
    def features(images): raise RuntimeError("shapes differ")
    learner.look = features
    with pytest.raises(RuntimeError, match="shapes differ"): fit(learner, lambda report: None)


def test_a_batch_without_a_number_stops_it():
    learner = make()
    ask = learner.loss
    learner.loss = lambda index, progress: ask(index, progress)*(float("nan") if progress > .4 else 1)
    with pytest.raises(NotFinite) as caught: fit(learner, lambda report: None)
    assert len(caught.value.places) == 16


def test_it_ends_early_with_the_best():
    learner, told, kept = make(epochs=9, patience=2), iter([.5, .7, .6, .65, .9]), []
    def validate(network):
        kept.append(torch.cat([p.detach().flatten().clone() for p in network.parameters()]))
        return {"accuracy": next(told)}
    learner.validate = validate
    reports = []
    fit(learner, reports.append)
    assert [r["accuracy"] for r in reports] == [.5, .7, .6, .65] and torch.equal(weights(learner), kept[1])


def test_all_gradients_are_clipped():
    long, short = make(), make(clip=1e-3)
    sizes = []
    for learner in (long, short):
        step = Step(learner)
        for optimizer in step.optimizers: optimizer.zero_grad = lambda: None
        step.take(torch.arange(16), .5)
        sizes.append(torch.cat([p.grad.flatten() for p in learner.network.parameters()]).norm().item())
    assert sizes[0] > 1e-2 and sizes[1] == pytest.approx(1e-3, rel=.01)


def test_a_rare_class_counts_more():
    learner = make(class_weights=1.)
    learner.labels = torch.tensor([0]*40 + [1]*4 + [2]*4)
    from cvops_wb.learn.learners.classification import weigh_classes
    found = weigh_classes(learner.labels, 3, 1.)
    assert found[1]/found[0] == pytest.approx(10) and (found[learner.labels]).mean() == pytest.approx(1)
    fit(learner, lambda report: None)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates(schedule):
    values = [rate(p/100, .2, schedule) for p in range(101)]
    assert values.index(max(values)) == 20 and max(values) == 1 and min(values) >= 0 and values[0] < .1 and values[:21] == sorted(values[:21])


def test_what_a_checkpoint_holds(tmp_path):
    "No pickle: tensors by name, and facts as JSON; and it is gone when the training is done."
    kept = Checkpoints(tmp_path/"c.safetensors", 0)
    run = Run(make(), lambda report: None, kept)
    run._epoch()
    run._keep()
    tensors, facts = read_checkpoint(kept.path)
    assert {"chance.own", "chance.torch", "chance.python", "chance.numpy", "weights.0.head.weight", "average.head.weight"} <= set(tensors)
    assert facts["epoch"] == 1 and facts["steps"] == 3 and any(name.startswith("optimizer.1.") for name in tensors)
    kept.drop()
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_as_none(tmp_path):
    kept = Checkpoints(tmp_path/"c.safetensors", 0)
    kept.path.write_bytes(b"half a file")
    reports = []
    fit(make(), reports.append, kept)
    assert len(reports) == 2


@pytest.mark.skipif(not os.environ.get("CVOPS_FULL"), reason="compiles for a minute or two: set CVOPS_FULL=1")
def test_compiled_it_learns_the_same():
    plain, compiled = make(), make(compile=True)
    for learner in (plain, compiled): fit(learner, lambda report: None)
    torch.testing.assert_close(weights(plain), weights(compiled), atol=.02, rtol=.1)


def test_deterministic_mode_is_left_as_it_was():
    fit(make(deterministic=True), lambda report: None)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_image_alone_is_no_batch():
    "17 images in batches of 8 are three batches of near equal length; what leaves one alone is said, where a network cannot learn from one."
    spec = LearnSpec(batch=8, crop=32)
    material = SimpleNamespace(rows=pd.DataFrame({"id": [str(k) for k in range(17)]}), pixels=Pixels(pd.Index([str(k) for k in range(17)]), None), size=32)
    assert sorted(len(batch) for batch in Learner(build_network("small_resnet:8", 3, 32), material, spec).batches()) == [5, 6, 6]
    with pytest.raises(WrongUsage, match="one image") as told: Step(make(accumulate=16)).take(torch.arange(16), .5)
    assert "accumulate" in told.value.fix
