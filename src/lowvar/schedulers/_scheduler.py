"""The scheduler itself: the protocol of diffusers around a `Recipe`, and what its config and files hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import is_torchsde_available
from torch import Tensor

from lowvar.calibrate.calibration import Calibration
from lowvar.errors import UserError
from lowvar.process.denoiser import CovarianceModel
from lowvar.process.grid import custom
from lowvar.process.head import COVARIANCE_HEADS, Spectrum
from lowvar.process.noise import NoiseSource, TorchGenerators
from lowvar.process.schedule import Schedule
from lowvar.process.solver import Solver
from lowvar.sample.named import SAMPLERS
from lowvar.schedulers._begin import Begin
from lowvar.schedulers._chain import Chain, Recipe
from lowvar.schedulers._classes import EVERY, Classes
from lowvar.schedulers._fields import (
    PREDICTIONS,
    check,
    class_name,
    make_schedule,
    needs_calibration,
    reads_head,
    require_held,
    sampler_fields,
    translate,
    translated,
)
from lowvar.schedulers._grids import chosen_times
from lowvar.schedulers._held import Held
from lowvar.schedulers._noising import Noising
from lowvar.schedulers._output import ReverseVarianceSchedulerOutput
from lowvar.schedulers._reader import Reader
from lowvar.schedulers._rows import Rows
from lowvar.schedulers._solvers import recipe_of, solver_of
from lowvar.schedulers._steps import Steps
from lowvar.schedulers._storage import (
    load_tensors,
    names_tensors,
    save_tensors,
)

__all__ = ["ReverseVarianceScheduler"]

_COMPATIBLES = [*(e.name for e in KarrasDiffusionSchedulers), "UniPCMultistepScheduler", "SASolverScheduler"]
if not is_torchsde_available():  # then there is a placeholder of that name, which raises when it is made
    _COMPATIBLES.remove("DPMSolverSDEScheduler")


class ReverseVarianceScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler with fixed, learned or calibrated reverse variance, on any grid.

    Args:
        num_train_timesteps: T of the network's training; `trained_betas` has its own.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the training's table, as in
            diffusers' DDPMScheduler.
        prediction_type: epsilon, sample, v_prediction, flow_prediction or edm.
        clip_sample, clip_sample_range: limit x0_hat to [-range, range], and a head's covariance with it (a calibrated
            one was measured around the clipped mean and stays); off for latents.
        timestep_spacing, steps_offset: leading, linspace or trailing timesteps of DDPMScheduler, where `grid` is None.
        schedule: what `Schedule.config` returned, for a schedule that is no beta table (cosine, linear, flow); the
            beta fields are then ignored.
        sampler: kernel, multistep, twin or the name of another solver (see the module).
        variance: the kernel's noise (see the module); the other samplers take theirs from `tau`.
        eta: the kernel's stochasticity, 0 to 1; `large` and `learned` are defined for 1 only.
        tau: the multistep samplers' stochasticity, 0 to 1.
        predictor, corrector, decay: as in `lowvar.process.MultistepSolver`.
        grid: None, a name (uniform, trailing, leading, quadratic, uniform-logsnr, karras, or of a calibration: path,
            entropic, variance-matched, optimal) or a list of decreasing times in [0, 1].
        head: the network's variance head: None, range (Nichol & Dhariwal 2021), logvar, basis or lowrank
            (`lowvar.process.head`).
        start_with_twin: of sampler twin-flow with grid path: False begins at t = 1, as every pipeline can. True begins
            at the grid's first level, at the state that `start` makes of noise without an evaluation. `input` begins
            there in a pipeline that hands over the noise itself and calls `scale_model_input`, as most do.
        calibration: a `Calibration`, or the JSON fields of one as they stand in the config.
        spectrum: the `Spectrum` of head basis, or the JSON fields of one as they stand in the config.
        sigma_data: standard deviation of the data that an `edm` network was trained for.
        use_dynamic_shifting, time_shift_type, shift_terminal: of flow schedules, as in diffusers'
            FlowMatchEulerDiscreteScheduler: times are shifted by the `mu` of `set_timesteps`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: what pipelines make that `mu` of.

    Raises:
        UserError: if a value is not allowed, a calibration is needed and missing, or it was made for another schedule.

    Example:
        >>> import torch
        >>> scheduler = ReverseVarianceScheduler(variance="small", timestep_spacing="trailing")
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 749, 499, 249]
        >>> x, generator = torch.zeros(2, 3, 8, 8), torch.Generator().manual_seed(0)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(torch.zeros_like(x), t, x, generator=generator).prev_sample
        >>> x.shape
        torch.Size([2, 3, 8, 8])
    """

    __module__ = "lowvar.schedulers"  # its one public path, which model_index.json names

    _compatibles: ClassVar[list[str]] = _COMPATIBLES

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        schedule: dict[str, Any] | None = None,
        sampler: str = "kernel",
        variance: str = "small",
        eta: float = 1.0,
        tau: float = 0.0,
        predictor: int = 2,
        corrector: int = 0,
        decay: float = 0.0,
        grid: str | list[float] | None = None,
        head: str | None = None,
        start_with_twin: bool | str = False,
        calibration: Any = None,
        sigma_data: float = 0.5,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        spectrum: Any = None,
    ) -> None:
        check(self.config)
        self.schedule: Schedule = make_schedule(self.config)
        self._held = Held(calibration, spectrum)
        self.register_to_config(**self._held.fields)
        self._held.require_schedule(self.config, self.schedule)
        require_held(self.config)
        solver_of(self.config, self._covariance_head)  # what is out of range is said now
        self._noising = Noising(self.schedule, num_train_timesteps)
        self.alphas_cumprod, self.betas = self._noising.alphas_cumprod, self._noising.betas
        self.num_inference_steps: int | None = None
        self._kept: Tensor | None = None
        self._classes = EVERY
        self._set(custom(self.schedule, self._noising.times.flip(0)), None)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the start, for data of variance 1: 1, and sqrt(sigma_max^2 + 1) for EDM."""
        top = self.schedule.at(1.0)
        return float(torch.sqrt(top.alpha**2 + top.sigma**2)) if self.schedule.family == "ve" else 1.0

    @property
    def order(self) -> int:
        """Network evaluations a step: 2 for Heun, else 1."""
        return -(-len(self._evaluations) // max(len(self._levels) - 1, 1))

    # ------------------------------------------------------------------------------------ calibration, variance head

    @property
    def calibration(self) -> Calibration | None:
        """The calibration, or None.

        Raises:
            UserError: if the config came without the tensors beside it, or does not fit together.
        """
        return self._held.calibration(self.config)

    def _required(self) -> Calibration:
        calibration = self.calibration
        assert calibration is not None, "__init__ refuses fields that need a calibration and have none"
        return calibration

    def keep_classes(self, labels: int | Sequence[int] | Tensor | None, guidance: float = 1.0) -> None:
        """Says the classes of the chains that follow, whose own tables are read where they were calibrated by class.

        The pipelines of this package say them; before a call of another one with `class_labels`, such as DiTPipeline,
        say them here. Sampling begins anew.

        Args:
            labels: class numbers, one for all samples or one each; a batch several times as large (guided pipelines
                double theirs) repeats them. None: all classes.
            guidance: scale of classifier-free guidance. Tables that were measured under another are not read.

        Raises:
            UserError: for a class that has no table.
        """
        self._classes = Classes.of(labels, guidance, self.calibration)
        self._recipe = self._chain = self._rows = None
        self._started = False

    @property
    def spectrum(self) -> Spectrum | None:
        """The spectrum of head basis, or None.

        Raises:
            UserError: if the config came without the tensors beside it, or does not fit together.
        """
        return self._held.spectrum(self.config)

    @property
    def _covariance_head(self) -> bool:
        """Whether variance `learned` is a covariance of x_0 that the network says, not Nichol & Dhariwal's range."""
        return self.config["variance"] == "learned" and self.config["head"] in COVARIANCE_HEADS

    def _make_reader(self) -> Reader:
        c = self.config
        kind = PREDICTIONS[c["prediction_type"]]
        rest = (c["sigma_data"], reads_head(c), self._evaluations, self.spectrum)
        try:
            return Reader(self.schedule, kind, c["head"], self._bound, *rest)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def _reader(self) -> Reader:
        if self._made_reader is None:
            self._made_reader = self._make_reader()
        return self._made_reader

    # ------------------------------------------------------------------------------------------------------- grids

    @property
    def times(self) -> Tensor:
        """The grid of `set_timesteps`: decreasing times of the schedule that end at 0, (K + 1,) float64."""
        return self._times

    @property
    def parts(self) -> tuple[Solver, CovarianceModel | None]:
        """What steps on the grid of `set_timesteps`, as `lowvar.sample.trajectory` takes it.

        Returns:
            The solver with its twin and calibrated noise, and the calibrated covariance that it reads, or None.

        Raises:
            UserError: if the calibration does not hold what is needed.
        """
        recipe = self._made_recipe()
        return recipe.solver, recipe.model

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Chooses the grid and forgets the last chain.

        Args:
            num_inference_steps: K, from 1 to T.
            device: of `timesteps`.
            timesteps: instead of K: decreasing timesteps, as the network is conditioned on them.
            sigmas: instead of K: decreasing sigma / alpha; of a flow sigma before the shift, as in diffusers'
                FlowMatchEulerDiscreteScheduler.
            mu: of flows with `use_dynamic_shifting`: logarithm of the shift (or the shift, if it is linear); others
                ignore it, as pipelines hand it to all.

        Raises:
            UserError: if none or several are given, or they are out of range.

        Example:
            >>> scheduler = ReverseVarianceScheduler(schedule={"schedule": "flow", "shift": 3.0},
            ...     prediction_type="flow_prediction")
            >>> scheduler.set_timesteps(sigmas=[1.0, 0.5])
            >>> scheduler.timesteps.tolist()
            [1000, 750]
        """
        times = chosen_times(
            self.config,
            self.schedule,
            self._noising.T,
            self._grid_calibration(),
            num_inference_steps,
            timesteps,
            sigmas,
            mu,
        )
        self.num_inference_steps = len(times) - 1
        self._set(times, device)

    def _grid_calibration(self) -> Calibration | None:
        return self._classes.tables(self._required())[0] if needs_calibration(self.config["grid"]) else None

    def _set(self, times: Tensor, device: str | torch.device | None) -> None:
        c = self.config
        self._times, self._levels = times, self.schedule.at(times)
        self._evaluations = solver_of(c, self._covariance_head).evaluations(self._levels)
        self._steps = Steps(self.schedule, self._evaluations, device)
        self.timesteps = self._steps.timesteps
        # read now: StableDiffusionPipeline switches clip_sample off in the config of the scheduler it is given
        self._bound = float(c["clip_sample_range"]) if c["clip_sample"] else None
        self._made_reader: Reader | None = None
        if self._held.is_complete(c["spectrum"]):
            self._made_reader = self._make_reader()  # else when the tensors beside the config are there
        self._recipe: Recipe | None = None
        self._chain: Chain | None = None
        self._rows: Rows | None = None
        self._begin_index: int | None = None
        self._started = False
        flows = c["sampler"] == "twin-flow" and c["start_with_twin"] == "input"
        self._begin = Begin(lambda x: self._flowed(x / self.init_noise_sigma)) if flows else None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says which entry of `timesteps` the next chain begins with, as image-to-image pipelines do."""
        self._begin_index, self._started = begin_index, False

    @property
    def begin_index(self) -> int | None:
        """What `set_begin_index` said, or None."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Number of the entry of `timesteps` that would follow the last step, or None before the first."""
        return self._chain.next if self._started and self._chain is not None else None

    @property
    def _expected(self) -> int:
        return self.step_index if self.step_index is not None else (self._begin_index or 0)

    def _index(self, timestep: Any) -> int:
        return self._steps.index(timestep, self._expected, trusted=self._begin_index is not None)

    def previous_timestep(self, timestep: Any) -> Tensor:
        """The timestep that follows in the chain, less noisy; -1 after the last.

        Example:
            >>> scheduler = ReverseVarianceScheduler()
            >>> scheduler.set_timesteps(timesteps=[100, 50, 0])
            >>> [scheduler.previous_timestep(t).item() for t in scheduler.timesteps]
            [50, 0, -1]
        """
        k = self._index(timestep)
        return self.timesteps[k + 1] if k + 1 < len(self.timesteps) else torch.tensor(-1)

    # ------------------------------------------------------------------------------------------------------- steps

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is given for a state: the sample as it is, for EDM c_in times the sample.

        With `start_with_twin` `input`, at the first timestep: the state that the noise handed over stands for.
        """
        if self.schedule.family != "ve" and self._begin is None:
            return sample
        k = self._expected if timestep is None else self._index(timestep)
        if self._begin is not None and k == 0:
            sample = self._begin.entry(sample)
        return sample if self.schedule.family != "ve" else self._reader.scale(sample, k)

    def start(self, noise: Tensor) -> Tensor:
        """The state at the first timestep from standard normal noise (B, C, ..): what a pipeline's start stands for.

        `init_noise_sigma` times the noise for most samplers; sampler twin-flow lets it flow along the twin, here, or in
        `scale_model_input` with `start_with_twin` `input`.
        """
        return self._flowed(noise) if self._begin is None else self.init_noise_sigma * noise

    def _flowed(self, noise: Tensor) -> Tensor:
        return self._made_recipe().solver.initial(noise, self.schedule.at(1.0), self._levels[0])

    def keep_head(self, head: Tensor) -> None:
        """Hands over the variance head's channels of the network's next output, where a pipeline cuts them off."""
        self._kept = head

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | NoiseSource | None = None,
        return_dict: bool = True,
        *,
        index: Sequence[int] | Tensor | None = None,
    ) -> Any:
        """One reverse step, or for a solver with two evaluations a step, one of both.

        Args:
            model_output: the network's output, C channels, or 2C with a variance head.
            timestep: an entry of `timesteps`; or one a sample, (B,), each its own entry, -1 for a sample that is
                finished and stays as it is. Samples at one timestep go on as one chain as long as they stay together.
            sample: x at that timestep, (B, C, ..).
            generator: source of the noise: one generator (in the order that diffusers draws), a list with one a
                sample, or a `NoiseSource` (draw k + 1 of the samples `index`, as in `lowvar.sample.trajectory`). Noise
                of generators is coloured by B diag(std) in a basis, of a source by the symmetric root B diag(std) B^T:
                the law is the same, and only the second keeps samples of different covariances close.
            return_dict: whether to return a `ReverseVarianceSchedulerOutput` or the tuple of its fields.
            index: sample numbers of the batch for a `NoiseSource` (default 0 .. B - 1).

        Raises:
            UserError: if the timestep is not in the grid, or the output does not fit the sample, the head and the
                variance.
        """
        x = sample if sample.dtype in (torch.float32, torch.float64) else sample.float()
        kept, self._kept = self._kept, None
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            if self._begin is not None:
                raise UserError("start_with_twin is 'input', which takes one timestep for the whole batch; set it True")
            if self._classes.several:
                raise UserError("samples of several classes take one timestep for the whole batch")
            if self._rows is None:
                self._rows = Rows(self._steps, self._made_recipe(), self._reader)
            previous, original = self._rows.step(model_output, timestep, x, _source(generator), index, kept)
        else:
            k, chain = self._index(timestep), self._made_chain()
            if self._begin is not None and k == 0:
                x = self._begin.state(sample).to(x.dtype)
            posterior, z = self._reader.read(x, k, model_output, kept), None
            source = _source(generator)
            if chain.recipe.draws(k):
                rows = range(x.shape[0]) if index is None else index
                drawn = model_output.dtype  # as diffusers draws it
                z = source.normal(rows, x.shape[1:], draw=k + 1, dtype=drawn, device=x.device).to(x.dtype)
            previous = chain.step(k, x, posterior, z, any_root=isinstance(source, TorchGenerators))
            original, self._started = posterior.mean, True
        if sample.dtype != x.dtype:
            previous, original = previous.to(sample.dtype), original.to(sample.dtype)
        return ReverseVarianceSchedulerOutput(previous, original) if return_dict else (previous, original)

    def _made_chain(self) -> Chain:
        if self._chain is None:
            self._chain = Chain(self._made_recipe())
        return self._chain

    def _made_recipe(self) -> Recipe:
        if self._recipe is None:
            self._recipe = recipe_of(self.config, self._levels, self._covariance_head, self._required, self._classes)
        return self._recipe

    # ---------------------------------------------------------------------------------------------------- training

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps at timesteps (B,) or (1,).

        Example:
            >>> scheduler = ReverseVarianceScheduler()
            >>> x = scheduler.add_noise(torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0, 999]))
            >>> [round(v, 4) for v in x.flatten().tolist()]
            [0.9999, 0.0064]
        """
        if self._begin is not None:
            self._begin.is_image = True
        alpha, sigma = self._noising.level(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the order of arguments that flow pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a v-prediction network is trained on: alpha_t eps - sigma_t x_0."""
        alpha, sigma = self._noising.level(timesteps, sample)
        return alpha * noise - sigma * sample

    def __len__(self) -> int:
        return self._noising.T

    # --------------------------------------------------------------------------------------------- saving, loading

    def __repr__(self) -> str:
        shown = {k: v for k, v in self.config.items() if k[0] != "_" and k not in ("calibration", "spectrum")}
        fields = self.config.get("calibration")
        if fields is not None:
            shown["calibration"] = f"<{fields.get('fingerprint')}>"
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes scheduler_config.json and, where the calibration has it, calibration.safetensors beside it."""
        if self._held.tensors:
            save_tensors(self._held.tensors, save_directory)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The scheduler that `save_pretrained` wrote; arguments as in diffusers' SchedulerMixin.

        Raises:
            UserError: if the tensors beside the config are missing or unreadable, or do not fit it.
        """
        made = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=return_unused_kwargs, **kwargs
        )
        scheduler = cast("Self", made[0] if isinstance(made, tuple) else made)
        if any(f is not None and names_tensors(f) for f in map(scheduler.config.get, ("calibration", "spectrum"))):
            scheduler._held.tensors = load_tensors(pretrained_model_name_or_path, subfolder, kwargs)
        _ = scheduler.calibration  # what does not fit is said now, not at the first step
        assert scheduler._reader is not None  # likewise
        return made

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler of a config, of this class or of another; arguments as in diffusers' ConfigMixin.

        Flow-matching schedulers describe their process by fields of their own, which are translated; so are EDM's where
        the config says that it is one's (as saved ones do; of an EDM scheduler in memory use `from_scheduler`).

        Raises:
            UserError: if a field is not allowed.
        """
        config = translated(config) if isinstance(config, Mapping) else config
        return super().from_config(cast("Any", config), return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_scheduler(cls, scheduler: Any, calibration: Calibration | None = None, **ours: Any) -> Self:
        """This scheduler in the place of another one of diffusers, for the same network.

        The schedule, prediction type, clipping and spacing are taken over. The sampler is, unless `ours` says
        otherwise: of DDPM the ancestral kernel with its variance, of DDIM the kernel with eta = 0, of any other the
        multistep solver; with a calibration, kernels take the variance `basis`.

        Args:
            scheduler: a scheduler, or its config.
            calibration: of the pipeline's network on this schedule.
            **ours: fields of this class; `sampler` may also be a name of `lowvar.sample.named.SAMPLERS`.

        Raises:
            UserError: if the schedule or a field is not supported here.

        Example:
            >>> from diffusers import DDIMScheduler
            >>> scheduler = ReverseVarianceScheduler.from_scheduler(DDIMScheduler(prediction_type="v_prediction"))
            >>> scheduler.config["eta"], scheduler.config["prediction_type"]
            (0.0, 'v_prediction')
        """
        known = cls._get_init_keys(cls) - {"self"}
        unknown = sorted(set(ours) - known)
        if unknown:
            raise UserError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        is_config = isinstance(scheduler, Mapping)
        config: Mapping[str, Any] = scheduler if is_config else scheduler.config
        name = class_name(config) if is_config else type(scheduler).__name__
        if name == cls.__name__:
            fields = {k: config[k] for k in known if k in config}
            calibration = calibration or getattr(scheduler, "calibration", None)
            if not is_config and scheduler.spectrum is not None:
                fields["spectrum"] = scheduler.spectrum
        else:
            fields = translate(name, config)
            if calibration is not None and fields["sampler"] == "kernel":
                fields["variance"] = "basis"
        if ours.get("sampler") in SAMPLERS:
            fields |= sampler_fields(ours.pop("sampler"))
        fields |= ours
        if calibration is not None:
            fields["calibration"] = calibration
        return cls(**fields)


def _source(generator: Any) -> NoiseSource:
    if isinstance(generator, NoiseSource):
        return generator
    if isinstance(generator, list) and len(generator) == 1:  # as diffusers' randn_tensor
        generator = generator[0]
    return TorchGenerators(generator)


__test__ = {"ReverseVarianceScheduler": ReverseVarianceScheduler}  # else doctest looks for its examples elsewhere
