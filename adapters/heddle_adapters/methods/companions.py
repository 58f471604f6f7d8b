"""What PEFT may train and save beside the tensors of any of its methods: biases, whole modules and rows of tokens.

Format: peft 0.21. `bias` "all" saves every bias of the base, "<method>_only" those of the targeted modules
(`tuners/tuners_utils.py:_get_learnable_bias_state_dict`): `base_layer.bias` at targeted modules, else `bias`.
`modules_to_save` names modules by the ends of their paths, compared by characters, so that "norm" is every path that
ends so (`utils/other.py:_set_trainable`); with `ensure_weight_tying` a tied head is saved with its embedding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.agreement import check_every_target_is_there
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter, listed, quoted
from heddle_adapters.methods.saved_modules import saved_bias, saved_embedding, saved_linear, saved_norm
from heddle_adapters.methods.trained_tokens import FIELD as TOKENS_FIELD
from heddle_adapters.methods.trained_tokens import EmbeddingRowsSource, TrainedTokens
from heddle_adapters.site_tensors import PEFT_PREFIX, SiteTensors, by_site
from heddle_adapters.source import Source
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

COMPANION_FIELDS = frozenset({"bias", "ensure_weight_tying", "fan_in_fan_out", "modules_to_save", TOKENS_FIELD})

MAX_SAVED_MODULES = 256  # each is compared with every module of the base and every tensor of the file
WEIGHT, BIAS, TARGET_BIAS = "weight", "bias", "base_layer.bias"


@dataclass(frozen=True)
class Companions:
    """What one config says of them."""

    config: AdapterConfig
    biases: Literal["none", "all", "targets"]
    modules: tuple[str, ...]  # endings of paths
    tokens: TrainedTokens
    ties_head: bool  # whether a tied head and a saved embedding stay one weight
    is_transposed: bool  # whether linear layers but the head are stored [in_features, out_features]

    @classmethod
    def from_config(cls, config: AdapterConfig, targets_only: str) -> Companions:
        """`targets_only` is what `bias` says for the biases of the targeted modules, for example "lora_only"."""
        kinds: Mapping[str, Literal["none", "all", "targets"]] = {"none": "none", "all": "all", targets_only: "targets"}
        bias = config.text("bias") or "none"
        if bias not in kinds:
            config.refuse("bias", f"is {quoted(bias)}; it must be 'none', 'all' or {quoted(targets_only)}.")
        modules = config.module_paths("modules_to_save")
        if len(modules) > MAX_SAVED_MODULES:
            config.refuse("modules_to_save", f"must be a list of at most {MAX_SAVED_MODULES} module names.")
        return cls(
            config=config,
            biases=kinds[bias],
            modules=modules,
            tokens=TrainedTokens.from_config(config),
            ties_head=config.flag("ensure_weight_tying"),
            is_transposed=config.flag("fan_in_fan_out"),
        )

    @property
    def are_none(self) -> bool:
        return self.biases == "none" and self.are_sums

    @property
    def are_sums(self) -> bool:
        """Whether they add biases and nothing else, so that the adapter can be part of a mix."""
        return not self.modules and not self.tokens.token_ids

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {**self.tokens.scalars, **({"ties_head": True} if self.ties_head and self.modules else {})}

    def beside(self, own: Sequence[Source], tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[Source, ...]:
        """The method's `own` parts, and those out of the tensors that these leave, in the order of the base's sites."""
        consumed = {name for source in own for name in source.shapes}
        left = {name: tensor for name, tensor in tensors.items() if name not in consumed}
        sources = (*own, *self.sources(left, base, {source.site for source in own}))
        position = base.index()
        return tuple(sorted(sources, key=lambda source: position[source.site]))

    def sources(
        self, tensors: Mapping[str, TensorInfo], base: BaseLayout, targets: Collection[str]
    ) -> tuple[Source, ...]:
        """Their parts, from the tensors that the method itself does not read; `targets` are the modules it changes."""
        modules, tokens = self._modules(tensors, base), self.tokens.sources(tensors, base)
        beside = [source.site for source in (*modules, *tokens)]
        if any(isinstance(source, EmbeddingRowsSource) and source.reach_head for source in tokens):
            beside += [source.site for source in modules if source.site == base.head]
        clashing = sorted({path for path in beside if beside.count(path) > 1 or path in targets})
        if clashing:
            message = (
                f"{CONFIG_FILE} changes {listed(clashing)} in more than one way: target_modules, modules_to_save and "
                f"{TOKENS_FIELD} must name different modules; upload the config that was saved with these weights."
            )
            raise InvalidAdapter(message, param=CONFIG_FILE)
        return (*modules, *tokens, *self._biases(tensors, base, targets, {source.site for source in modules}))

    def _modules(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> list[Source]:
        if not self.modules:
            return []
        known = base.by_path("linear", "norm", "embedding")
        promised = [path for path in known if self._is_saved(path)]
        is_tied = self.ties_head and base.head_is_tied and {base.embedding, base.head} & {*promised} != set()
        if is_tied:
            promised = [*dict.fromkeys([*promised, base.embedding or "", base.head or ""])]
        names = {PEFT_PREFIX + path for path in promised} | {*promised}
        inside = [
            tensor
            for tensor in tensors.values()
            if (module := tensor.name.rpartition(".")[0]) in names or self._is_saved(module.removeprefix(PEFT_PREFIX))
        ]
        found = {each.site.path: each for each in by_site(inside, (WEIGHT, BIAS), base, "linear", "norm", "embedding")}
        missing = [path for path in promised if path not in found]
        if missing:
            message = (
                f"{WEIGHTS_FILE} has nothing for modules that modules_to_save of {CONFIG_FILE} promises: "
                f"{listed(missing)}; upload the whole file that was saved with this config."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        self._check_every_name(known)
        head = found.pop(base.head or "") if is_tied else None
        return [self._module(each, head, base) for each in found.values()]

    def _module(self, found: SiteTensors, tied_head: SiteTensors | None, base: BaseLayout) -> Source:
        site, weight = found.site, found.require(WEIGHT).name
        bias = found.require(BIAS).name if site.has_bias else None
        if site.kind == "norm":
            return saved_norm(site, weight, bias)
        if site.kind == "embedding":
            return saved_embedding(site, weight, None if tied_head is None else tied_head.require(WEIGHT).name)
        if self.is_transposed and site.path != base.head:
            message = (
                f"{CONFIG_FILE}: modules_to_save holds {site.path}, a layer that fan_in_fan_out says is stored "
                "transposed, and such layers are not replaced; adapt it with target_modules instead."
            )
            raise InvalidAdapter(message, param=CONFIG_FILE)
        return saved_linear(site, weight, bias)

    def _check_every_name(self, known: Collection[str]) -> None:
        """What fits no module of the base is not in the file either: a tensor of such a name has been refused."""
        names = {parent for path in known for parent in _with_parents(path)}
        unknown = next((ending for ending in self.modules if not any(name.endswith(ending) for name in names)), None)
        if unknown is not None:
            message = (
                f"{WEIGHTS_FILE} has nothing for {quoted(unknown)}, which modules_to_save of {CONFIG_FILE} names; "
                "upload the whole file that was saved with this config."
            )
            raise InvalidAdapter(message, param=CONFIG_FILE)

    def _is_saved(self, path: str) -> bool:
        """Whether `modules_to_save` names the module or one that it is inside of."""
        return any(parent.endswith(self.modules) for parent in _with_parents(path))

    def _biases(
        self, tensors: Mapping[str, TensorInfo], base: BaseLayout, targets: Collection[str], saved: Collection[str]
    ) -> list[Source]:
        if self.biases == "none":
            return []
        if self.biases == "all":  # a module's bias does not count for what target_modules promises of it
            check_every_target_is_there(self.config, {*targets, *saved}, base)
        parts = (TARGET_BIAS, BIAS) if self.biases == "all" else (TARGET_BIAS,)
        own = [tensor for tensor in tensors.values() if not self._is_saved(_module_of(tensor.name))]
        found = {each.site.path: each for each in by_site(own, parts, base, "linear", "norm")}
        sites = base.by_path("linear", "norm")
        unknown = [quoted(path) for path in found if not sites[path].has_bias]
        if unknown:
            message = f"{WEIGHTS_FILE} has biases for modules of {base.model_name} that have none: {listed(unknown)}"
            raise AdapterIncompatible(
                f"{message}; upload it where the base it was trained on is served.", param=WEIGHTS_FILE
            )
        wanted = [
            site
            for path, site in sites.items()
            if site.has_bias and path not in saved and (path in targets or self.biases == "all")
        ]
        missing = [site.path for site in wanted if site.path not in found]
        if missing:
            message = (
                f"{WEIGHTS_FILE} lacks biases that bias of {CONFIG_FILE} promises: {listed(missing)}; upload the whole "
                "file that was saved with this config."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        parts_of = {site.path: TARGET_BIAS if site.path in targets else BIAS for site in wanted}
        return [saved_bias(site, found[site.path].require(parts_of[site.path]).name) for site in wanted]


def _with_parents(path: str) -> list[str]:
    """The module's path and those of the modules that it is inside of, as PEFT names them."""
    parents = [PEFT_PREFIX + path]
    while parents[-1].count(".") > PEFT_PREFIX.count("."):
        parents.append(parents[-1].rpartition(".")[0])
    return parents


def _module_of(name: str) -> str:
    return name.rpartition(".")[0].removeprefix(PEFT_PREFIX)
