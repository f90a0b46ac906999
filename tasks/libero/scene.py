"""Opens a LIBERO problem as its ControlEnv does, but builds the model once and with only what will be looked at.

Stock LIBERO compiles its scene twice (in the constructor and in `reset`), with every mesh and texture of the house.
Visual geoms weigh nothing and touch nothing (robosuite's models say `inertiagrouprange="0 0"`), so a simulator that
never renders does without them; one that renders has its textures uploaded by `cameras.py`, once a process.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
import robosuite
from libero.libero.envs import TASK_MAPPING, bddl_utils
from robosuite.utils.errors import RandomizationError

from vlarl_bench.errors import BenchError

PLACEMENT_TRIES = 20
"""Stock ControlEnv.reset retries for ever."""


@dataclass(frozen=True)
class Shown:
    """What a scene shows: its textures and meshes in the order of the model's ids, as MJCF without the name."""

    textures: tuple[str, ...]
    meshes: tuple[str, ...]
    frame: str
    """MJCF of the rest that a renderer is told in advance: materials, planes and `<visual>`."""


class _BuiltOnce:
    """Goes before a LIBERO problem class: its constructor leaves what stock construction and `reset` leave."""

    visuals: bool
    sim: Any
    model: Any
    object_property_initializers: list[Any]

    def _assert_problem_name(self) -> None:
        """Stock compares the BDDL file with the class's name, which is another here."""

    def _load_model(self) -> None:
        super()._load_model()  # type: ignore[misc]
        # Each load adds the same samplers again, and how many there are decides what the seed draws for fixtures.
        self._samplers = list(self.object_property_initializers)
        self.object_property_initializers += self._samplers
        self.model.generate_id_mappings = _not_needed  # for segmentation images; asks for every visual geom

    def _initialize_sim(self, xml_string: str | None = None) -> None:
        self.shown = keep_needed(self.model.root, self.visuals)
        self._masks: dict[tuple[str, ...], np.ndarray] = {}
        super()._initialize_sim(xml_string)  # type: ignore[misc]

    def _reset_internal(self) -> None:
        for _ in range(PLACEMENT_TRIES):
            try:
                super()._reset_internal()  # type: ignore[misc]
                return
            except RandomizationError:  # stock builds everything again and draws on
                self.object_property_initializers += self._samplers
                self.sim.reset()
                self.sim.forward()
        raise BenchError(
            f"LIBERO: could not place the objects of {self.bddl_file_name} in {PLACEMENT_TRIES} tries; "  # type: ignore[attr-defined]
            "is the installation intact?"
        )

    def _setup_observables(self) -> dict[str, Any]:
        return {}

    def check_contact(self, geoms_1: Any, geoms_2: Any = None) -> bool:
        """Stock's answer, without asking for the names of both geoms of every contact at every step."""
        pairs = self.sim.data._data.contact.geom
        ours = self._of(geoms_1)[pairs]
        theirs = np.ones_like(ours) if geoms_2 is None else self._of(geoms_2)[pairs]
        return bool((ours & theirs[:, ::-1]).any())

    def _of(self, geoms: Any) -> np.ndarray:
        """[geoms of the model] bool: which a name, names or a model mean."""
        names = (geoms,) if isinstance(geoms, str) else tuple(getattr(geoms, "contact_geoms", geoms))
        if names not in self._masks:
            model = self.sim.model
            self._masks[names] = np.array([model.geom_id2name(geom) in names for geom in range(model.ngeom)])
        return self._masks[names]


def _not_needed(sim: Any) -> None:
    pass


def open_problem(bddl: str, visuals: bool) -> Any:
    """The environment inside LIBERO's ControlEnv as `seed(0); reset()` leaves it; without `visuals` it cannot render.

    What it shows is in `shown`; its textures are left to `cameras.py`.
    """
    problem = TASK_MAPPING[bddl_utils.get_problem_info(bddl)["problem_name"]]
    once = type(f"BuiltOnce{problem.__name__}", (_BuiltOnce, problem), {"visuals": visuals})
    others = np.random.get_state()
    np.random.seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            env = once(
                bddl,
                robots=["Panda"],
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                gripper_types="default",
                initialization_noise=None,
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                control_freq=20,
                horizon=10**9,
            )
    finally:
        np.random.set_state(others)
    env.sim.forward()
    env.visualize({part: False for part in env._visualizations})
    return env


def keep_needed(root: Element, visuals: bool) -> Shown:
    """Drops from an MJCF tree, in place, what changes neither physics nor, with `visuals`, any image.

    Textures become stand-ins of one pixel. Without `visuals` the geoms that only show something go as well.
    """
    assets, world = root.find("asset"), root.find("worldbody")
    assert assets is not None and world is not None
    if not visuals:
        for parent in list(root.iter()):
            for geom in parent.findall("geom"):
                if geom.get("group") == "1" and geom.get("contype") == "0" and geom.get("conaffinity") == "0":
                    parent.remove(geom)
        for element in root.iter():
            element.attrib.pop("material", None)
    users = [*world.iter("geom"), *world.iter("site")]
    _retain(assets, "mesh", {user.get("mesh") for user in users})
    _retain(assets, "material", {user.get("material") for user in users})
    _retain(assets, "texture", {material.get("texture") for material in assets.findall("material")}, sky=visuals)
    textures = tuple(map(_nameless, assets.findall("texture")))
    for texture in assets.findall("texture"):
        stand_in = {"name": texture.get("name", "sky"), "builtin": "flat", "width": "1", "height": "1"}
        texture.attrib = {**stand_in, "type": texture.get("type", "cube")}
    return Shown(textures, tuple(map(_nameless, assets.findall("mesh"))), _frame(root))


def _retain(assets: Element, tag: str, names: set[str | None], sky: bool = False) -> None:
    for element in assets.findall(tag):
        if element.get("name") not in names and not (sky and element.get("type") == "skybox"):
            assets.remove(element)


def _nameless(element: Element) -> str:
    attributes = sorted((key, value) for key, value in element.attrib.items() if key != "name")
    return ElementTree.tostring(Element(element.tag, dict(attributes)), encoding="unicode")


def _frame(root: Element) -> str:
    frame = Element("mujoco")
    frame.extend(root.findall("visual"))
    assets, world = ElementTree.SubElement(frame, "asset"), ElementTree.SubElement(frame, "worldbody")
    for part in root.findall("asset"):
        assets.extend([*part.findall("texture"), *part.findall("material")])
    for part in root.findall("worldbody"):
        for body in (part, *part.iter("body")):  # in the order of MuJoCo's ids
            world.extend(geom for geom in body.findall("geom") if geom.get("type") == "plane")
    return ElementTree.tostring(frame, encoding="unicode")
