"""Where a LIBERO scene's surfaces are, and how the expert can grip an object among them."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mujoco
import numpy as np

if TYPE_CHECKING:
    from .simulator import LiberoSimulator

FINGER_SPAN = 0.072
"""Widest object (m) that the open gripper can take between its fingers; the fingers open to 80 mm."""

Footprint = tuple[tuple[float, ...], tuple[float, ...]]
FINGERS: Footprint = ((-0.065, -0.05, -0.035, 0.035, 0.05, 0.065), (-0.012, 0.0, 0.012))
PALM: Footprint = ((-0.1, -0.05, 0.05, 0.1), (-0.045, 0.0, 0.045))
"""Points of the open gripper seen from above (m): along the line on which the fingers open, and at right angles."""


@dataclass(frozen=True)
class Grasp:
    """A top-down grasp."""

    position: np.ndarray
    """[3] world position of the grip site, m."""
    yaw: float
    """Turn about the vertical from the resting orientation, rad. At 0 the fingers open along world y."""
    rim: bool = False
    """Whether one finger goes inside and one outside, for a thing that is too wide for the gripper."""


class Scene:
    """Where the surfaces of the objects are, as point clouds. Local points are computed once, poses are read live."""

    MOST_POINTS = 1000
    """Of one geom; enough to find a bowl's rim to a millimetre."""
    VISUAL = 1
    """MuJoCo geom group that holds the detailed meshes in robosuite's models."""
    COLLISION = np.array([1, 0, 0, 0, 0, 0], np.uint8)
    """Mask of the geom groups that can be hit."""
    DOWN = np.array([0.0, 0.0, -1.0])

    def __init__(self, simulator: "LiberoSimulator") -> None:
        model = simulator.model
        self.model, self.data, self.env = model, simulator.data, simulator.env
        self.objects = {name: self._subtree(body) for name, body in self.env.obj_body_id.items()}
        self.bodies = set().union(*self.objects.values())
        self.points = {
            geom: self._local(geom)
            for geom in range(model.ngeom)
            if model.geom_group[geom] == self.VISUAL and int(model.geom_bodyid[geom]) in self.bodies
        }

    def _subtree(self, root: int) -> set[int]:
        bodies = {int(root)}
        for body in range(int(root) + 1, self.model.nbody):  # MuJoCo numbers parents before children.
            if int(self.model.body_parentid[body]) in bodies:
                bodies.add(body)
        return bodies

    def _local(self, geom: int) -> np.ndarray:
        model = self.model
        if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH:
            centre, half = np.split(model.geom_aabb[geom], 2)
            corners = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), -1).reshape(-1, 3)
            return centre + half * corners
        mesh = model.geom_dataid[geom]
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        return np.array(model.mesh_vert[first : first + count : max(1, count // self.MOST_POINTS)], np.float64)

    def _world(self, bodies: set[int]) -> np.ndarray:
        clouds = [
            points @ self.data.geom_xmat[geom].reshape(3, 3).T + self.data.geom_xpos[geom]
            for geom, points in self.points.items()
            if int(self.model.geom_bodyid[geom]) in bodies
        ]
        return np.concatenate(clouds) if clouds else np.zeros((0, 3))

    def cloud(self, name: str) -> np.ndarray:
        """[N, 3] surface points of one object."""
        return self._world(self.objects[name])

    def of_body(self, body: int) -> np.ndarray:
        """[N, 3] surface points of a drawer, door or knob."""
        return self._world(self._subtree(body))

    def others(self, name: str) -> np.ndarray:
        """[N, 3] surface points of everything that a gripper reaching for `name` might hit."""
        return self._world(self.bodies - self.objects[name])

    def clutter(self, name: str, grasp: Grasp) -> int:
        """How much would be in the way of the open gripper coming down from above: 0 when nothing."""
        across, along = finger_axes(grasp.yaw)
        relative = self.others(name) - grasp.position
        u, v, height = np.abs(relative[:, :2] @ across), np.abs(relative[:, :2] @ along), relative[:, 2]
        palm = (u < 0.115) & (v < 0.05) & (height > 0.04) & (height < 0.2)
        return int(palm.sum()) + self._under(name, grasp, FINGERS, -0.015)

    def cramped(self, name: str, grasp: Grasp) -> int:
        """How many parts of the hand, above the fingers, would hit a big thing (a drawer, a wall): 0 when none."""
        return self._under(name, grasp, PALM, 0.04)

    def _under(self, name: str, grasp: Grasp, footprint: Footprint, height: float) -> int:
        """Under how much of a part of the hand, `height` above the grip site, something else is in the way.

        Big flat parts (a drawer's walls) have no vertices where the hand goes, so this looks down with rays.
        """
        across, along = finger_axes(grasp.yaw)
        blocked = 0
        for u, v in itertools.product(*footprint):
            start = grasp.position + np.append(u * across + v * along, 0.25)
            blocked += self._first_below(start, self.objects[name]) > grasp.position[2] + height
        return blocked

    def _first_below(self, start: np.ndarray, ignored: set[int]) -> float:
        """Height of the first collision geom of the scene (no robot, not `ignored`) under a point; -inf when none."""
        start = np.array(start)
        hit = np.zeros(1, np.int32)
        while True:
            distance = mujoco.mj_ray(self.model, self.data, start, self.DOWN, self.COLLISION, 1, -1, hit)
            if distance < 0:
                return -np.inf
            start[2] -= distance
            body = int(self.model.geom_bodyid[hit[0]])
            if body in self.bodies - ignored:
                return float(start[2])
            start[2] -= 1e-4

    def floor(self, name: str) -> float:
        """Height at which a finger that comes down on the middle of a thing touches it."""
        cloud = self.cloud(name)
        return self._first_below(np.append(middle(cloud), cloud[:, 2].max() + 0.05), self.bodies - self.objects[name])

    def room(self, target: str) -> np.ndarray:
        """[3] half extents (m) of a region; zero for an object, which has no inside."""
        region = self.env.object_sites_dict.get(target)
        if region is None:
            return np.zeros(3)
        site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, target)
        return np.abs(self.data.site_xmat[site].reshape(3, 3) @ np.asarray(region.size))

    def highest_between(self, name: str, start: np.ndarray, goal: np.ndarray) -> float:
        """Top (m) of the loose things within 6 cm of the straight way from one horizontal position to another."""
        others = set().union(*(self.objects[other] for other in self.env.objects_dict if other != name))
        cloud = self._world(others)
        along = goal - start
        share = np.clip((cloud[:, :2] - start) @ along / max(float(along @ along), 1e-9), 0, 1)
        near = np.linalg.norm(cloud[:, :2] - start - share[:, None] * along, axis=1) < 0.06
        return float(cloud[near, 2].max(initial=-np.inf))

    def support(self, target: str) -> np.ndarray:
        """[3]: the middle of an object or region, at the height on which a thing placed there will rest."""
        if target in self.objects:
            cloud = self.cloud(target)
            return np.append(middle(cloud), cloud[:, 2].max())
        site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, target)
        return self.data.site_xpos[site].copy()


def plan_grasp(
    scene: Scene,
    name: str,
    rng: np.random.Generator | None,
    lean: Callable[[np.ndarray], float],
    way: np.ndarray | None = None,
) -> Grasp:
    """Chooses how to grip an object from above, where nothing else is in the way.

    Across the whole object where it fits between the fingers, else by its rim. With `rng` (after a miss) the choice
    is perturbed, so that a second attempt differs from the first. `lean` says how hard a position is to reach (rad).
    `way` [3] is where the thing will be carried, for places where the hand may not fit everywhere.
    """

    def trouble(grasp: Grasp) -> float:
        there = 0 if way is None else scene.cramped(name, Grasp(grasp.position + way, grasp.yaw))
        return 2 * lean(grasp.position) + 0.15 * (scene.cramped(name, grasp) + there)

    cloud = scene.cloud(name)
    jitter = 0.0 if rng is None else 1.0
    draw = np.random.default_rng(0).random if rng is None else rng.random
    top, bottom = cloud[:, 2].max(), cloud[:, 2].min()
    depth = max(top - min(0.035, 0.6 * (top - bottom)), bottom + 0.008)
    grasps: list[tuple[float, Grasp]] = []
    for yaw in np.deg2rad(np.arange(-90, 91, 5)):
        across, along = finger_axes(yaw)
        width = np.ptp(cloud[:, :2] @ across)
        if width >= FINGER_SPAN:
            continue
        centre = across * midrange(cloud[:, :2] @ across) + along * midrange(cloud[:, :2] @ along)
        grasp = Grasp(np.append(centre, depth), float(yaw))
        cost = 2 * width + 0.004 * abs(yaw) + 0.02 * min(scene.clutter(name, grasp), 20) + jitter * 0.01 * draw()
        cost += trouble(grasp)
        grasps.append((cost, grasp))
    if not grasps:
        rim = cloud[cloud[:, 2] > top - 0.012]
        centre = middle(rim)
        relative = rim[:, :2] - centre
        for yaw in np.deg2rad(np.arange(-75, 76, 15)):
            for side in (1, -1):
                across = side * finger_axes(yaw)[0]
                along = np.array([-across[1], across[0]])
                here = (np.abs(relative @ along) < 0.012) & (relative @ across > 0)
                if not here.any():
                    continue
                point = centre + across * np.median((relative @ across)[here])
                grasp = Grasp(np.append(point, top - 0.018), float(yaw), rim=True)
                nearer = 0.1 if point[0] < centre[0] else 0.0  # The arm comes from -x and would shade the rim there.
                cost = 0.3 * abs(yaw) + 0.15 * min(scene.clutter(name, grasp), 20) + nearer + jitter * 0.2 * draw()
                cost += trouble(grasp)
                grasps.append((cost, grasp))
    if not grasps:  # Neither narrow nor ring-shaped: the middle is as good as any.
        return Grasp(np.append(middle(cloud), depth), 0.0)
    return min(grasps, key=lambda item: item[0])[1]


def finger_axes(yaw: float) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal unit vectors [2]: along which the fingers open, and at right angles to it."""
    return np.array([-np.sin(yaw), np.cos(yaw)]), np.array([np.cos(yaw), np.sin(yaw)])


def middle(cloud: np.ndarray) -> np.ndarray:
    """[2] horizontal middle of a cloud's extent."""
    return (cloud[:, :2].max(0) + cloud[:, :2].min(0)) / 2


def midrange(values: np.ndarray) -> float:
    """Half way between the smallest and the largest value."""
    return float(values.max() + values.min()) / 2
