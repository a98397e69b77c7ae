"""DynaLoRA (Brouwers, Fülöp, Hamar, Krastev, 2024, no arXiv id): only some modules train at a time; all contribute.

    y_m = Σ_x ‖(W + ΔW) x‖_p        ŷ_m = y_m / Σ_k y_k                                        (equations 1 and 2)

A module is one adapted layer of any other method. ``allocate`` chooses the next active ones from ŷ.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from random import Random
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nemo_tiedlora.errors import UsageError, check_choice
from nemo_tiedlora.variants.allocate import ALLOCATORS, Modules, Name, normalised
from nemo_tiedlora.variants.base import Alone, Factors, Site, Variant, Wrapper
from nemo_tiedlora.variants.config import DERIVED, VariantConfig, check_number
from nemo_tiedlora.variants.weight import FrozenWeight

Schedule = Literal["periodic", "once"]
Importance = Literal["forward", "backward"]
Norm = Literal[1, 2]
#: Whose steps learning rates and optimizer states go by.
Steps = Literal["global", "local"]

#: What ``backward`` importance starts from, as in the authors' code: a module without a gradient can still be drawn.
LEAST = 1e-6


@dataclass(kw_only=True)
class DynamicConfig(VariantConfig):
    """Settings of DynaLoRA, beside those of every method, which go to the inner one.

    Args:
        inner: the method whose modules take turns: ``lora``, ``vera``, ``tied_lora``, ``share_lora``, ``cond_lora``.
        settings: the inner method's own settings, e.g. ``{preset: TL5}``; null for none.
        allocator: ``topk``, ``threshold``, ``stochastic``, ``discounted_stochastic`` or ``random``.
        active: k, how many modules are active; null means two thirds of them.
        threshold: p of the ``threshold`` allocator, which takes no ``active``.
        schedule: ``periodic``: choose anew every ``period`` steps; ``once``: a single time, after ``period`` steps.
        period: in optimizer steps.
        importance: ``forward``, the norm of the layer's output per sample; or ``backward``, the norm of the gradient
            of its factors per micro-batch. An inactive module has none: as in the authors' code, its score goes on
            growing by what it gained in its last active step.
        scoring_steps: of ``backward``: for how many steps all modules are active before the first choice, so that each
            has a score. The authors take one ``period``.
        norm: p of equation 1: 1 or 2.
        optimizer: ``global``: one learning-rate schedule for all; ``local``: each tensor follows the schedule, and its
            optimizer counts steps, by the steps it was active for.
    """

    scheme: str = "dyna_lora"
    inner: str = "lora"
    settings: dict[str, Any] = DERIVED
    allocator: Name = "discounted_stochastic"
    active: int | None = None
    threshold: float = 0.5
    schedule: Schedule = "periodic"
    period: int = 50
    importance: Importance = "forward"
    scoring_steps: int = 1
    norm: Norm = 2
    optimizer: Steps = "global"

    def __post_init__(self):
        super().__post_init__()
        self.settings = {} if self.settings is None else self.settings
        check_choice("allocator", self.allocator, get_args(Name))
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("importance", self.importance, get_args(Importance))
        check_choice("norm", self.norm, get_args(Norm))
        check_choice("optimizer", self.optimizer, get_args(Steps))
        if type(self.period) is not int or self.period < 1:
            raise UsageError("period", self.period, "must be a whole number of steps > 0")
        if type(self.scoring_steps) is not int or not 1 <= self.scoring_steps <= self.period:
            raise UsageError("scoring_steps", self.scoring_steps, f"must be 1 to the period, {self.period}")
        if self.scoring_steps != 1 and not self.scores("backward"):
            raise UsageError("scoring_steps", self.scoring_steps, "goes with importance: backward, where it is used")
        if self.active is not None and (type(self.active) is not int or self.active < 1):
            raise UsageError("active", self.active, "must be a whole number > 0, or null for two thirds of the modules")
        if self.active is not None and self.allocator == "threshold":
            raise UsageError("active", self.active, "the threshold allocator takes as many as it needs; set threshold")
        check_number("threshold", self.threshold)
        if not 0 < self.threshold <= 1:
            raise UsageError("threshold", self.threshold, "must be more than 0 and at most 1")
        if not isinstance(self.settings, dict):
            raise UsageError("settings", self.settings, "write a mapping, such as {preset: TL5}")

    def scores(self, importance: Importance) -> bool:
        """Whether modules are chosen by this importance."""
        return self.allocator != "random" and self.importance == importance

    def inner_settings(self) -> dict[str, Any]:
        """The inner method's settings: its own, and what was said here of those that every method has."""
        said = {
            item.name: getattr(self, item.name)
            for item in fields(VariantConfig)
            if item.name not in ("scheme", "target_modules", "checksums") and getattr(self, item.name) != item.default
        }
        return {"target_modules": self.target_modules, "checksums": self.checksums} | said | self.settings


@dataclass(frozen=True)
class Allocation:
    """One choice: the step it was made before, the active modules, and every module's ŷ then."""

    step: int
    active: list[str]
    importance: dict[str, float]


class Dynamic(Wrapper[DynamicConfig]):
    """Any variant, of whose modules only the active ones get gradients.

    The factors of an inactive module are constants, so it keeps no activations for them and computes no gradient of
    them. ``start`` is called once with all modules, ``advance`` after every optimizer step, both at the same time on
    all ranks; everything kept is the same on all ranks.

    Attributes:
        modules: the model's modules, in order.
        active: those that train now.
        step: optimizer steps taken.
        importance: y_m of each module.
        last_gain: what each module's ``backward`` importance grew by in its last active step.
        active_steps: how many steps each module was active for.
        log: every choice made.
    """

    changes_with_step = True

    def __init__(self, config: DynamicConfig, inner: Variant):
        super().__init__(config, inner)
        self.modules: list[Site] = []
        self.active: frozenset[Site] = frozenset()
        self.step = 0
        self.importance: list[float] = []
        self.last_gain: list[float] = []
        self.active_steps: list[int] = []
        self.log: list[Allocation] = []
        self._random = Random(config.seed)
        #: Σ|·|^p of what was seen since the last step, one value per sample, by part and module.
        self._seen: dict[tuple[str, Site], list[Tensor]] = {}

    def decided(self) -> dict[str, Any]:
        return {"settings": {**self.config.settings, **self.inner.decided()}}

    def factors(self, site: Site, tensors: Mapping[str, Tensor], weight: FrozenWeight) -> Factors:
        factors = self.inner.factors(site, tensors, weight)
        if site not in self.active:
            return factors.detached()
        if self._scores("backward") and torch.is_grad_enabled():
            factors = factors.folded()
            factors = factors._replace(A=self._watched(site, "A", factors.A), B=self._watched(site, "B", factors.B))
        return factors

    def _scores(self, importance: Importance) -> bool:
        config = self.config
        return config.scores(importance) and not (config.schedule == "once" and self.step >= config.period)

    def _watched(self, site: Site, part: str, factor: Tensor) -> Tensor:
        if not factor.requires_grad:
            return factor
        factor = factor.view_as(factor)  # a hook on a parameter itself would stay on it
        factor.register_hook(lambda grad: self._note(site, part, grad[None]))
        return factor

    @property
    def observes(self) -> bool:
        # Not in the first pass of a recomputed layer.
        return self.inner.observes or (self._scores("forward") and torch.is_grad_enabled())

    def observe(self, site: Site, output: Tensor) -> None:
        if self.inner.observes:
            self.inner.observe(site, output)
        if self._scores("forward"):
            self._note(site, "output", output)

    def _note(self, site: Site, part: str, values: Tensor) -> None:
        """Remember Σ|values|^p of each sample: (samples, ...)."""
        values = values.detach().flatten(1)
        precise = torch.promote_types(values.dtype, torch.float32)
        norms = torch.linalg.vector_norm(values, self.config.norm, dim=1, dtype=precise)
        self._seen.setdefault((part, site), []).append(norms**self.config.norm)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("output",) if self.config.importance == "forward" else ("A", "B")

    def start(self, sites: Iterable[Site]) -> None:
        self.modules = list(sites)
        self.inner.start(self.modules)
        if (self.config.active or 1) > len(self.modules):
            raise UsageError("active", self.config.active, f"there are {len(self.modules)} modules to choose from")
        backward = self.config.scores("backward")
        self.importance = [LEAST if backward else 0.0] * len(self.modules)
        self.last_gain, self.active_steps = [0.0] * len(self.modules), [0] * len(self.modules)
        if backward:
            self.active = frozenset(self.modules)
        else:
            self._allocate()

    @property
    def own_schedules(self) -> bool:
        return self.config.optimizer == "local"

    def advance(self, ranks: Alone | None = None) -> None:
        """Add up the scores, and choose anew if it is time."""
        for number, module in enumerate(self.modules):
            self.active_steps[number] += module in self.active
        if self._scores(self.config.importance):
            gained = self._gained(ranks or Alone())
            if self.config.importance == "backward":
                pairs = zip(self.modules, gained, self.last_gain, strict=True)
                self.last_gain = gained = [new if module in self.active else last for module, new, last in pairs]
            self.importance = [score + more for score, more in zip(self.importance, gained, strict=True)]
        self._seen.clear()
        self.step += 1
        if self._time_to_choose():
            self._allocate()

    def check(self, site: Site) -> None:
        super().check(site)
        if site.routed and self.config.scores("forward"):
            way_out = f"{site.target} sees tokens that a router sends it, not samples; set it to backward"
            raise UsageError("importance", "forward", way_out)

    def _time_to_choose(self) -> bool:
        config = self.config
        if self.step == config.scoring_steps and config.scores("backward"):
            return True
        return self.step == config.period or (config.schedule == "periodic" and self.step % config.period == 0)

    def _gained(self, ranks: Alone) -> list[float]:
        """Σ_x ‖·‖_p of each module over the samples of one step, by equation 1."""
        seen = {name: torch.cat(powers) for name, powers in self._seen.items()}
        samples = max(map(len, seen.values()), default=0)
        device = next(iter(seen.values())).device if seen else None
        powers = torch.zeros(len(self.parts), len(self.modules), samples, dtype=torch.float64, device=device)
        for row, part in enumerate(self.parts):
            for number, module in enumerate(self.modules):
                if (part, module) in seen:
                    powers[row, number, : len(seen[part, module])] = seen[part, module]
        norms = ranks.within(powers).sum(0) ** (1 / self.config.norm)
        return ranks.across(norms.sum(1)).tolist()

    def _allocate(self) -> None:
        config, modules = self.config, self.modules
        choice = Modules(self.importance, [1 + steps for steps in self.active_steps])
        wanted = config.threshold if config.allocator == "threshold" else self._number_active(len(modules))
        numbers = ALLOCATORS[config.allocator](choice, wanted, self._random)
        self.active = frozenset(modules[number] for number in numbers)
        names = self._names()
        shares = dict(zip(names, normalised(self.importance), strict=True))
        self.log.append(Allocation(self.step, [names[number] for number in numbers], shares))

    def _number_active(self, modules: int) -> int:
        return self.config.active or math.ceil(2 * modules / 3)

    def trained_at_once(self, sites: Iterable[Site]) -> int | None:
        """On average if all modules are chosen equally often; a tensor of several trains if one of them does."""
        if self.config.allocator == "threshold":
            return None
        users: dict[str, set[Site]] = {}
        sizes: dict[str, int] = {}
        modules = list(sites)
        for site in modules:
            for spec in self.tensors(site).values():
                if spec.trained:
                    users.setdefault(spec.key, set()).add(site)
                    sizes[spec.key] = math.prod(spec.shape(site, self.rank))
        k, total = min(self._number_active(len(modules)), len(modules)), len(modules)
        idle = {key: math.comb(total - len(of), k) / math.comb(total, k) for key, of in users.items()}
        return round(sum(size * (1 - idle[key]) for key, size in sizes.items()))

    def _names(self) -> list[str]:
        return [f"{module.target}.{module.layer}" for module in self.modules]

    def history(self) -> dict[str, Any]:
        """Every module's number of active steps, and every choice made; JSON can hold it."""
        log = [asdict(allocation) for allocation in self.log]
        return {"steps": self.step, "modules": self._names(), "active_steps": self.active_steps, "log": log}

    def active_keys(self) -> set[str]:
        """Of the tensors that some active module uses."""
        return {spec.key for module in self.active for spec in self.tensors(module).values()}

    def state_dict(self) -> dict[str, Any]:
        """All that decides how it goes on; JSON can hold it."""
        version, numbers, gauss = self._random.getstate()
        return {
            "step": self.step,
            "active": [number for number, module in enumerate(self.modules) if module in self.active],
            "importance": self.importance,
            "last_gain": self.last_gain,
            "active_steps": self.active_steps,
            "log": [asdict(allocation) for allocation in self.log],
            "random": [version, list(numbers), gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, after ``start``."""
        self.step = state["step"]
        self.active = frozenset(self.modules[number] for number in state["active"])
        self.importance, self.last_gain = list(state["importance"]), list(state["last_gain"])
        self.active_steps = list(state["active_steps"])
        self.log = [Allocation(**allocation) for allocation in state["log"]]
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))
