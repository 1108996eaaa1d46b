"""Training a quantized model to give the outputs of the float one (Hinton et al., arXiv 1503.02531); needs no labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ..errors import QATError
from ..preparation import prepared_report, restore
from .checkpoints import fingerprint

Loss = Callable[[Any, Any], Tensor]


def logits_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the class probabilities of ``student`` from those of ``teacher``.

    Args:
        student: Logits, shape ``(N, classes, ...)``.
        teacher: The same shape.

    Returns:
        Shape ``()``, float32, at least 0: the mean over all positions, in nats.
    """
    if not isinstance(student, Tensor) or not isinstance(teacher, Tensor) or student.shape != teacher.shape or student.ndim < 2:
        raise QATError("distillation: the outputs are no logits of one shape (N, classes, ...): pass a loss for them")
    found, wanted = F.log_softmax(student.float(), 1), F.log_softmax(teacher.float(), 1)
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(1).mean()


def float_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of a model without its sites, in evaluation mode: a teacher for :class:`Distillation`."""
    teacher = copy.deepcopy(model)
    if prepared_report(teacher) is not None:
        restore(teacher)
    return teacher.eval().requires_grad_(False)


class Distillation:
    """Compares what a model computes in training with what its teacher computes of the same inputs.

    Args:
        student: The model in training. Calls in evaluation mode or without gradients do not count.
        teacher: Called as the student is. It is switched to evaluation mode and frozen, in place.
        loss: Of the outputs of one call, student's and teacher's. By default :func:`logits_divergence`.

    Attributes:
        listening: Whether calls of the student are remembered.

    Example:
        >>> model, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> distillation = Distillation(model, teacher)
        >>> y = model(torch.ones(1, 3))
        >>> bool(distillation.loss() >= 0)
        True
        >>> distillation.remove()
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: Loss | None = None) -> None:
        if any(module is student for module in teacher.modules()) or any(module is teacher for module in student.modules()):
            raise QATError("distillation: the teacher is a part of the model, or the other way round. Pass a copy")
        self.teacher = teacher.eval().requires_grad_(False)
        self._loss = loss or logits_divergence
        self.listening = True
        self._calls: list[tuple[Any, Any, Any]] = []
        self._given: tuple[Any, Any] | None = None
        self._hooks = [
            student.register_forward_pre_hook(self._take, with_kwargs=True),
            student.register_forward_hook(self._remember),
        ]

    def _take(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._given = None
        if self.listening and module.training and torch.is_grad_enabled():
            # Copies: the student, or whoever owns the batch, may change it before the teacher sees it.
            self._given = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))

    def _remember(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._given is not None:
            self._calls.append((*self._given, out))
            self._given = None

    def loss(self) -> Tensor:
        """The mean loss of the student's calls since the last time, shape ``()``; these are then forgotten.

        Raises:
            QATError: If the student was not called.
        """
        calls, self._calls = self._calls, []
        if not calls:
            raise QATError("distillation: the model was not called in training mode since the last loss")
        losses = []
        for args, kwargs, out in calls:
            with torch.no_grad():
                expected = self.teacher(*args, **kwargs)
            losses.append(self._loss(out, expected))
        return torch.stack(losses).mean()

    def forget(self) -> None:
        """Drop the calls so far, and what they keep in memory."""
        self._calls, self._given = [], None

    def remove(self) -> None:
        """Stop listening to the student."""
        self.forget()
        for hook in self._hooks:
            hook.remove()

    def fingerprint(self) -> str:
        """Of the teacher's parameters and buffers: tells whether another process has the same teacher."""
        return fingerprint(self.teacher)
