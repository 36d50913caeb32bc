"""A method that registers itself is all that a run needs to know of it."""

from dataclasses import replace

import pytest
import torch
from students import own_methods

from maskcf_fast.methods import METHODS, Method, build_method, register
from maskcf_fast.methods.losses import step_output, task_loss
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer
from maskcf_fast.training import Trainer
from maskcf_fast.training.settings import parse


class Smooth(Method):
    """Cross-entropy, and a penalty on the logits' size."""

    weight_decay = 0.25

    def __init__(self, student, weight=0.5):
        super().__init__(student, weight=weight)

    def losses(self, images, labels, *, generator=None):
        logits = self.student(images)
        return step_output(task_loss(logits, labels), logits, logits.square().mean(), self.weight)


@pytest.fixture(autouse=True)
def _smooth():
    @register("smooth", "weight")
    def _(student, **settings):
        """Small logits."""
        return Smooth(student, **settings)

    yield
    del METHODS["smooth"]


@pytest.mark.parametrize(("given", "weight"), [(None, 0.5), (2.0, 2.0)])
def test_a_run_of_it(change, given, weight):
    config = change(method={"name": "smooth", "weight": given}, optim={"epochs": 1})
    trainer = Trainer(replace(config, eval_every=0), quiet=True)
    assert (type(trainer.method), trainer.method.weight) == (Smooth, weight)
    assert trainer.optimizer.defaults["weight_decay"] == 0.25
    start = trainer.method.student.head.weight.detach().clone()
    trainer.run()
    assert not torch.equal(start, trainer.method.student.head.weight)


def test_help_lists_it(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "smooth: Small logits." in capsys.readouterr().out


def test_what_it_does_not_read_is_refused(change):
    for wrong in ({"ema_teacher": 0.9}, {"cam_every": 2}):
        with pytest.raises(ValueError, match="smooth has n"):
            change(method={"name": "smooth", **wrong}).validate()
    with pytest.raises(ValueError, match=r"unknown method 'smoth'.*did you mean 'smooth'"):
        change(method={"name": "smoth"}).validate()


@pytest.mark.parametrize(
    "options",
    [
        "--config ft --method.weight 3",
        "--config kd --method.cam gradcam",
        "--config object-multi --method.name fd --method.top_k=2",
        "--config lp --method.strategy object-single",
    ],
)
def test_an_option_without_effect_is_refused(options):
    with pytest.raises(ValueError, match=r"--method\.\w+(=2)? has no effect on .*leave it out"):
        parse(options.split())
    parse(options.split()[:-2] if "=" not in options else options.split()[:-1])


@pytest.mark.parametrize("name", own_methods())
def test_every_method_takes_the_settings_that_it_reads(name):
    """And has its own defaults for those that are not given."""
    student = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3))
    settings = parse(["--method.name", name]).method
    method = build_method(name, student, {**vars(settings), "strategy": settings.mask_strategy()})
    assert not METHODS[name].distils or method.teacher is not None
    assert hasattr(method, "strategy") == METHODS[name].masks
    batch = torch.rand(4, 3, 32, 32), torch.randint(3, (4,))
    assert method.backward(*batch).loss.isfinite()
