"""The neurons of a model: the layer that owns the amplitudes, and its kinds.

Each row of this table adds one thing to the row before, so that a comparison measures that one thing:

    neuron       spikes              threshold   added
    lif          0, 1                1 / 2
    bi-spiking   -1, 0, +1           1 / 2       the negative spike
    elastic      -a[t], 0, +a[t]     a[t] / 2    an amplitude, and with it a firing rate, that fits the membranes
    learned      the same about a    a[t] / 2    amplitudes of each channel, and a shift, that are learned (learned.py)
                 shift
    thrifty      the same            a[t] / 2 +  a threshold apart from the amplitude, by what a spike may cost

Keys and values pass the same spike function without a membrane, each step alone: ternary where the neuron is ternary,
binary for LIF. So every product of an encoder layer keeps an operand of spikes, whatever the neuron, and an encoder of
LIF neurons has binary spikes only, as spiking transformers do (Zhou et al., ICLR 2023, arXiv:2209.15425).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .configuration_spiking import CALIBRATION_FIELDS, SpikingConfig
from .fast_paths import is_transformed
from .fitting import AMPLITUDE_FLOOR, fit_amplitude, fit_channels, mean_over, nearest
from .fused_spikes import spike
from .learned import Levels, level_spikes
from .lif import lif
from .packing import spikes_of
from .sharding import whole, write
from .spiking import integrate, kept_share, ternary

logger = logging.get_logger(__name__)

HOW_TO_CALIBRATE = "Call model.calibrate(batches), or train the model, whose first step does it."


class SpikingNeurons(nn.Module):
    """One group of neurons: turns `(T * B, L, F)` real values into `(T * B, L, F)` spikes, time step major.

    The amplitudes are the persistent float32 buffer `amplitude` of shape `(T,)`, where 0 means "not calibrated". They
    are `amplitude_scale * mean(|membrane|)` over every position, of every process, of the first training batch, and
    frozen from then on. While they are not calibrated, evaluation uses the statistics of the batch at hand.

    Neurons of another kind are a subclass that gives its name, `class LIFNeurons(SpikingNeurons, neuron="lif")`, and
    overrides `emit`, sets `fixed_amplitude`, or both. With a `fixed_amplitude` nothing is calibrated, and the buffer is
    no part of a checkpoint.

    Args:
        config: gives T, the decay, the amplitude's scale and the reset. Changing it later changes nothing here.
        num_neurons: F.
        has_membrane: without one every step stands alone, `m[t] = x[t]` (keys and values).

    Attributes:
        built_for: the values that the amplitudes are made for, by the name of their field in the configuration.
    """

    # The class of every `SpikingConfig.neuron`.
    kinds: ClassVar[dict[str, type["SpikingNeurons"]]] = {}
    fixed_amplitude: ClassVar[float | None] = None
    amplitude: torch.Tensor

    def __init_subclass__(cls, neuron: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if neuron is not None:
            SpikingNeurons.kinds[neuron] = cls

    def __init__(self, config: SpikingConfig, num_neurons: int, has_membrane: bool = True):
        super().__init__()
        self.num_neurons = num_neurons
        self.built_for = {field: getattr(config, field) for field in CALIBRATION_FIELDS}
        self.num_time_steps = config.num_time_steps
        self.decay = config.membrane_decay
        self.amplitude_scale = config.amplitude_scale
        self.reset = config.membrane_reset
        self.has_membrane = has_membrane
        amplitude = torch.full((config.num_time_steps,), self.initial_amplitude, dtype=torch.float32)
        self.register_buffer("amplitude", amplitude, persistent=self.fixed_amplitude is None)
        # True once `amplitude` is known on the host to be set, so that a forward need not ask the device.
        self.is_calibrated = self.fixed_amplitude is not None
        self.register_load_state_dict_pre_hook(SpikingNeurons._leave_out_other_steps)
        self.register_load_state_dict_post_hook(SpikingNeurons._read_after_load)

    def extra_repr(self) -> str:
        return (
            f"{self.num_neurons}, num_time_steps={self.num_time_steps}, decay={self.decay}, reset={self.reset!r}, "
            f"has_membrane={self.has_membrane}"
        )

    @property
    def initial_amplitude(self) -> float:
        """What the amplitudes are in a new model; 0 means "not calibrated"."""
        return 0.0 if self.fixed_amplitude is None else self.fixed_amplitude

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        steps = inputs.unflatten(0, (self.num_time_steps, -1))
        calibration = self.calibration() if self.is_calibrated else self._first_calibration(steps)
        return self.emit(steps, calibration).flatten(0, 1)

    def emit(self, steps: torch.Tensor, calibration: torch.Tensor) -> torch.Tensor:
        """Spikes `(T, B, L, F)` of inputs `(T, B, L, F)`, differentiable.

        Args:
            calibration: as `calibration()` has it; of these neurons, amplitudes `(T,)`.
        """
        return spike(steps, calibration, self.decay, self.reset, self.has_membrane)

    def calibration(self) -> torch.Tensor:
        """All that calibration sets, as one vector whose mean over batches makes sense."""
        return self.amplitude

    def codes(self, spikes: torch.Tensor) -> torch.Tensor:
        """What spikes `(T * B, L, F)` that these neurons have emitted are: -1, 0 or +1, int8."""
        return spikes.detach().sign().to(torch.int8)

    def spikes(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The spikes `(T * B, L, F)` that `codes` stand for; of calibrated neurons."""
        return spikes_of(codes.unflatten(0, (self.num_time_steps, -1)), self.amplitude, None, dtype).flatten(0, 1)

    @torch.compiler.disable
    def _first_calibration(self, steps: torch.Tensor) -> torch.Tensor:
        """Of a group not known to be calibrated: found set after all, or set by a training batch, or lent."""
        if not torch.compiler.is_compiling():  # an exporter traces through here, and a traced buffer has no values
            self.read_calibration()
        if self.is_calibrated:
            return self.calibration()
        if not self.training:
            logger.warning_once(
                "This SpikeLM is not calibrated: its spike amplitudes are taken from each batch, so outputs depend on "
                f"what else is in the batch. {HOW_TO_CALIBRATE}"
            )
            return self.batch_calibration(steps)
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel cannot calibrate a SpikeLM, because its replicas are thrown away. Call "
                "model.calibrate(batches) first, or train with one process per device (accelerate launch, torchrun)."
            )
        if is_transformed(steps):
            raise RuntimeError(
                "A SpikeLM cannot calibrate while torch.jit traces it or torch.func transforms it, because that would "
                "become a part of what is traced. Call model.calibrate(batches) first."
            )
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            logger.warning_once(
                f"A forward in training mode without gradients, on {steps[0, ..., 0].numel()} tokens, has set this "
                "SpikeLM's spike amplitudes for good. Was it a test, and no training with use_reentrant? "
                f"{HOW_TO_CALIBRATE}"
            )
        values = self.batch_calibration(steps, every_process=True)
        if not (torch.compiler.is_compiling() or values.is_meta or values.isfinite().all()):
            logger.warning_once(
                "A training batch without a token, or with values that are not finite, sets no spike amplitudes: this "
                "SpikeLM stays not calibrated. Look at the data and at the weights."
            )
            return values
        self.set_calibration(values)
        return self.calibration()

    def batch_calibration(self, steps: torch.Tensor, every_process: bool = False) -> torch.Tensor:
        """What one batch sets `calibration()` to; arguments as for `batch_amplitude`."""
        return self.batch_amplitude(steps, every_process)

    def init_calibration(self) -> None:
        """Makes a new group of it, "not calibrated" if it can be; what transformers has loaded it leaves alone."""
        init.constant_(self.amplitude, self.initial_amplitude)

    def set_calibration(self, values: torch.Tensor) -> None:
        """Calibrates the group to what `batch_calibration` has returned; see `set_amplitude`."""
        self.set_amplitude(values)

    @torch.no_grad()
    def batch_amplitude(self, steps: torch.Tensor, every_process: bool = False) -> torch.Tensor:
        """`amplitude[t] = k * mean(|m[t]|)` of one batch, each step's fixed before its spikes shape the next membrane.

        Args:
            steps: `(T, ...)` inputs, all of which count.
            every_process: the mean is over the batches of all processes of the default group, which all have to call.

        Returns:
            `(T,)` float32, at least `AMPLITUDE_FLOOR`.
        """
        amplitudes = []
        membrane, kept = None, None
        for step_inputs in steps.float().unbind():
            membrane = integrate(step_inputs, membrane, kept)
            amplitude = self.amplitude_scale * mean_over(membrane.abs(), every_process)
            amplitude = amplitude.clamp(min=AMPLITUDE_FLOOR)
            if self.has_membrane:
                kept = kept_share(ternary(membrane, amplitude), amplitude, self.decay, self.reset)
            amplitudes.append(amplitude)
        return torch.stack(amplitudes)

    def set_amplitude(self, amplitude: torch.Tensor) -> None:
        """Calibrates the group to `amplitude`, `(T,)`, above 0; all zeros: not calibrated again.

        Raises:
            ValueError: these neurons have a fixed amplitude.
        """
        if self.fixed_amplitude is not None:
            raise ValueError(f"{type(self).__name__} have the fixed amplitude {self.fixed_amplitude}.")
        write(self.amplitude, amplitude)
        self.read_calibration()

    def read_calibration(self) -> None:
        """Asks the buffer whether it is calibrated; to be called when something else has written it."""
        if self.fixed_amplitude is not None:
            return
        values = [0.0] if self.amplitude.is_meta else whole(self.amplitude).tolist()
        self.is_calibrated = all(value and math.isfinite(value) for value in values)
        if any(values) and not self.is_calibrated:
            fault = "set for some time steps only" if all(map(math.isfinite, values)) else "not finite"
            logger.warning(f"Spike amplitudes {values} are {fault}: taken as not calibrated.")

    @staticmethod
    def _leave_out_other_steps(
        module: "SpikingNeurons", state_dict: dict[str, torch.Tensor], prefix: str, *args: Any
    ) -> None:
        # Amplitudes of another number of steps say nothing here: the group is not calibrated.
        given = state_dict.get(f"{prefix}amplitude")
        if given is not None and given.dim() == 1 and given.shape != module.amplitude.shape:
            state_dict[f"{prefix}amplitude"] = torch.zeros_like(module.amplitude, device=given.device)
            logger.warning_once(
                f"The state dict has spike amplitudes of {len(given)} time steps, this model has "
                f"num_time_steps={module.num_time_steps}: its neurons are not calibrated now. {HOW_TO_CALIBRATE}"
            )

    @staticmethod
    def _read_after_load(module: "SpikingNeurons", incompatible_keys: Any) -> None:
        # load_state_dict(assign=True) brings the file's dtype.
        for _, values in module._calibrated_tensors():
            values.data = values.data.float()
        module.read_calibration()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SpikingNeurons":
        # .to(torch.bfloat16), .half() and the like cast whatever is floating; what calibration sets stays float32.
        before = {name: values.data for name, values in self._calibrated_tensors()}
        super()._apply(fn, recurse)
        for name, values in self._calibrated_tensors():
            if values.dtype != torch.float32:
                values.data = before[name].to(values.device)
        return self

    def _calibrated_tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]


SpikingNeurons.kinds["elastic"] = SpikingNeurons


class BiSpikingNeurons(SpikingNeurons, neuron="bi-spiking"):
    """Bi-directional spikes of fixed amplitude: the elastic neuron (spiking.py) with `amplitude[t] = 1`.

        m[0] = x[0]
        m[t] = decay * m[t-1] * (1 - s[t-1]) + x[t]       reference reset
        m[t] = decay * m[t-1] * (1 - |s[t-1]|) + x[t]     symmetric reset
        s[t] = clip(round(m[t]), -1, +1)                  +1 above 1/2, -1 below -1/2, else 0
        ds[t]/dm[t] = 1 where |m[t]| <= 1, else 0

    The paper (arXiv:2406.03287, section 3) introduces the negative spike before the elastic amplitude; that the step
    between the two is an amplitude of 1 in the elastic equation, threshold included, is our reading.
    """

    fixed_amplitude = 1.0


class LIFNeurons(SpikingNeurons, neuron="lif"):
    """Leaky integrate-and-fire neurons with binary spikes and a surrogate gradient.

        m[0] = x[0]
        m[t] = decay * m[t-1] * (1 - s[t-1]) + x[t]       a spike resets the membrane to 0
        s[t] = 1 where m[t] > 1/2, else 0
        ds[t]/dm[t] = 1 where |m[t] - 1/2| <= 1/2, else 0

    The iterative LIF neuron of Wu et al. (STBP, Frontiers in Neuroscience 2018, arXiv:1706.02609) and their rectangular
    surrogate, in the constants of Zheng et al. (AAAI 2021, arXiv:2011.05280): threshold 1/2, window of width 1, decay
    0.25 (SpikeLM's decay, too). The window makes the gradient that of the other neurons here, straight through between
    the levels of a spike; as with them, what the reset keeps counts as a constant. Both rules of `membrane_reset` say
    the same of spikes 0 and 1, so only its default is taken.
    """

    fixed_amplitude = 1.0

    def emit(self, steps: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
        return lif(steps, self.decay, self.has_membrane)


class LearnedNeurons(SpikingNeurons, neuron="learned"):
    """Ternary neurons that learn their levels, from the calibrated start, by LSQ's gradient; see learned.py.

    Parameters: `amplitude` `(T,)`, where 0 means "not calibrated"; `log_scale` `(F,)`, of the scale, which stays above
    0 by it and moves by shares; `shift` `(F,)`. Calibration sets the scale and the shift of a channel to those of the
    quantiser with the least squared error on the inputs of all steps (Lloyd's iteration), then the amplitude of a step
    likewise on its membranes, 1 in the first.
    """

    log_scale: nn.Parameter
    shift: nn.Parameter
    price: torch.Tensor

    def __init__(self, config: SpikingConfig, num_neurons: int, has_membrane: bool = True):
        super().__init__(config, num_neurons, has_membrane)
        amplitude = self.amplitude
        del self.amplitude
        self.amplitude = nn.Parameter(amplitude)
        # float32 where a model is loaded in 16 bits, too: a step of a training is less than their last bit.
        self.log_scale = nn.Parameter(torch.zeros(num_neurons, dtype=torch.float32))
        self.shift = nn.Parameter(torch.zeros(num_neurons, dtype=torch.float32))
        # What a spike has to save of the squared error, in units of the squared inputs; calibrated, then frozen.
        self.register_buffer("price", torch.zeros(1, dtype=torch.float32))
        self.spike_cost = config.spike_cost

    def init_calibration(self) -> None:
        super().init_calibration()
        for values in (self.log_scale, self.shift, self.price):
            init.zeros_(values)

    def calibration(self) -> torch.Tensor:
        """Amplitudes `(T,)`, logarithms of the scales `(F,)`, shifts `(F,)` and the price `(1,)`, side by side."""
        return torch.cat([whole(values) for values in (self.amplitude, self.log_scale, self.shift, self.price)])

    def levels(self, calibration: torch.Tensor) -> Levels:
        """The levels that a vector of `calibration()` says."""
        amplitude, log_scale, shift, price = calibration.split([self.num_time_steps, *[self.num_neurons] * 2, 1])
        return Levels(amplitude.clamp(min=AMPLITUDE_FLOOR), log_scale.exp(), shift, self.cost(log_scale, price))

    def cost(self, log_scale: torch.Tensor, price: torch.Tensor) -> torch.Tensor | None:
        """What a spike costs, for `Levels`: nothing here."""
        return None

    def emit(self, steps: torch.Tensor, calibration: torch.Tensor) -> torch.Tensor:
        """Spikes about the shift, `(T, B, L, F)`, of inputs of that shape."""
        return level_spikes(steps, self.levels(calibration), self.decay, self.reset, self.has_membrane)

    def codes(self, spikes: torch.Tensor) -> torch.Tensor:
        return self.signs(spikes.detach()).to(torch.int8)

    def spikes(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        levels = self.levels(self.calibration())
        steps = codes.unflatten(0, (self.num_time_steps, -1))
        return spikes_of(steps, levels.sizes(), levels.shift, dtype).flatten(0, 1)

    def signs(self, spikes: torch.Tensor) -> torch.Tensor:
        """Which spikes `(T * B, L, F)` that these neurons have emitted are: -1, 0 or +1."""
        levels = self.levels(self.calibration())
        steps = spikes.unflatten(0, (self.num_time_steps, -1)).float()
        sizes = levels.sizes().view(self.num_time_steps, *(1 for _ in steps.shape[1:-1]), -1)
        # In 16 bits a spike was rounded, and so was the shift where there is none.
        shift = levels.shift.to(spikes.dtype).float()
        return ((steps - shift) / sizes).round().clamp(-1, 1).flatten(0, 1)

    @torch.no_grad()
    def batch_amplitude(self, steps: torch.Tensor, every_process: bool = False) -> torch.Tensor:
        """The amplitudes `(T,)` of `batch_calibration`."""
        return self.batch_calibration(steps, every_process)[: self.num_time_steps]

    @torch.no_grad()
    def batch_calibration(self, steps: torch.Tensor, every_process: bool = False) -> torch.Tensor:
        """What one batch `(T, ..., F)` sets `calibration()` to, arguments as for `SpikingNeurons.batch_amplitude`."""
        inputs = steps.float().flatten(1, -2)
        scale, shift, price = fit_channels(inputs.flatten(0, 1), self.spike_cost, every_process)
        cost = self.cost(scale.log(), price)
        amplitudes: list[torch.Tensor] = []
        membrane, kept = None, None
        for step_inputs in inputs:
            membrane = integrate((step_inputs - shift) / scale, membrane, kept)
            # The scale is the amplitude of the first step.
            is_first = not amplitudes
            amplitude = torch.ones_like(price[0]) if is_first else fit_amplitude(membrane, cost, every_process)
            if self.has_membrane:
                kept = kept_share(nearest(membrane, amplitude, cost), amplitude, self.decay, self.reset)
            amplitudes.append(amplitude)
        return torch.cat((torch.stack(amplitudes), scale.log(), shift, price))

    def set_calibration(self, values: torch.Tensor) -> None:
        """Calibrates the group to what `batch_calibration` has returned."""
        amplitude, log_scale, shift, price = values.split([self.num_time_steps, *[self.num_neurons] * 2, 1])
        for own, given in ((self.log_scale, log_scale), (self.shift, shift), (self.price, price)):
            write(own, given)
        self.set_amplitude(amplitude)


class ThriftyNeurons(LearnedNeurons, neuron="thrifty"):
    """Learned neurons that fire only where a spike lowers the squared error by more than `config.spike_cost`.

    The cost is a share of the variance of the group's inputs, the mean over channels, so channels that vary little fire
    seldom: that is where spikes buy least.
    """

    def cost(self, log_scale: torch.Tensor, price: torch.Tensor) -> torch.Tensor:
        """The price in units of the squared scale, `(F,)`."""
        return price / (2 * log_scale.detach()).exp()


def make_neurons(config: SpikingConfig, num_neurons: int, has_membrane: bool = True) -> SpikingNeurons:
    """A new group of the neurons that `config.neuron` names; without a membrane for keys and values."""
    return SpikingNeurons.kinds[config.neuron](config, num_neurons, has_membrane)


def neuron_groups(model: nn.Module) -> list[SpikingNeurons]:
    """Every group of neurons, in the order of the network."""
    return [module for module in model.modules() if isinstance(module, SpikingNeurons)]


def calibrated_groups(model: nn.Module) -> list[SpikingNeurons]:
    """The groups whose amplitudes are calibrated, now or later, and not fixed."""
    return [neurons for neurons in neuron_groups(model) if neurons.fixed_amplitude is None]
