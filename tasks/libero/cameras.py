"""Cameras of LIBERO scenes: the frames of robosuite's renderer, bit for bit, at a part of its memory and time.

robosuite gives every environment an OpenGL context of its own with all its textures, 0.3 to 1 GB. Here a process has
one, into which a texture or mesh is uploaded once, whichever tasks show it; and what a camera cannot see is not drawn.
"""

from __future__ import annotations

import atexit

import mujoco
import numpy as np
from robosuite.utils.binding_utils import GLContext

from .scene import Shown

_HIDDEN_GROUP = 5
"""A geom group that MuJoCo does not draw unless asked to."""
_MESH = int(mujoco.mjtGeom.mjGEOM_MESH)
_REFLECTING = [int(mujoco.mjtGeom.mjGEOM_PLANE), int(mujoco.mjtGeom.mjGEOM_BOX)]
_MARGIN = 0.01
"""m; geoms that miss a camera's view by less are drawn all the same."""


class _Library:
    """The process's OpenGL context, and where the textures and meshes of open (and last closed) scenes are in it."""

    def __init__(self) -> None:
        self.context = GLContext(max_width=1, max_height=1, device_id=-1)
        self.context.make_current()
        from OpenGL import GL as gl  # only now is it settled by which library

        self.gl = gl
        self.textures: dict[str, int] = {}
        """File and way of reading it -> OpenGL's number of the texture."""
        self.meshes: dict[str, int] = {}
        """The same -> the first of two display lists; the second is for the mesh's hull, if it has one."""
        self.cameras: list[Cameras] = []
        atexit.register(self.context.free)

    def add(self, cameras: Cameras, model: mujoco.MjModel) -> None:
        """Uploads what is not here yet, and drops what no open scene shows."""
        self.cameras.append(cameras)
        shown, context = cameras.shown, cameras.context
        missing = [texture for texture in dict.fromkeys(shown.textures) if texture not in self.textures]
        if missing:
            kinds = context.textureType.copy()  # uploading would leave those of `source`
            named = [texture.replace("<texture", f'<texture name="{i}"', 1) for i, texture in enumerate(missing)]
            source = mujoco.MjModel.from_xml_string(f"<mujoco><asset>{''.join(named)}</asset></mujoco>")
            for index, texture in enumerate(missing):
                self.textures[texture] = context.texture[index] = int(self.gl.glGenTextures(1))
                mujoco.mjr_uploadTexture(source, context, index)
            context.textureType[:] = kinds
        for index, mesh in enumerate(shown.meshes):
            if mesh not in self.meshes:
                self.meshes[mesh] = int(self.gl.glGenLists(2))
                context.baseMesh = (self.meshes[mesh] - 2 * index) % 2**32  # MuJoCo adds 2 index, modulo 2^32
                mujoco.mjr_uploadMesh(model, context, index)
        context.baseMesh = 0
        for texture in set(self.textures).difference(*(other.shown.textures for other in self.cameras)):
            self.gl.glDeleteTextures([self.textures.pop(texture)])
        for mesh in set(self.meshes).difference(*(other.shown.meshes for other in self.cameras)):
            self.gl.glDeleteLists(self.meshes.pop(mesh), 2)


_library: _Library | None = None


class Cameras:
    """Renders one scene, as the stock environment's offscreen renderer does."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, shown: Shown, msaa: bool) -> None:
        global _library
        if _library is None:
            _library = _Library()
        self._library = _library
        self._library.context.make_current()
        self.model, self.data, self.shown = model, data, shown
        # A context of MuJoCo's draws what belongs to one model. This one is made of the scene's planes and materials
        # alone; textures and meshes come from the library.
        frame = mujoco.MjModel.from_xml_string(shown.frame)
        frame.stat.extent, frame.stat.center = model.stat.extent, model.stat.center
        if not msaa:
            frame.vis.quality.offsamples = 0
        if not model.light_castshadow.any():
            frame.vis.quality.shadowsize = 0  # 64 MB that nothing would be drawn into
        self.context = mujoco.MjrContext(frame, mujoco.mjtFontScale.mjFONTSCALE_150)
        self._own_textures = self.context.texture.copy()
        self._library.add(self, model)
        self.context.texture[: len(shown.textures)] = [self._library.textures[texture] for texture in shown.textures]
        self._lists = [self._library.meshes[mesh] for mesh in shown.meshes]
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        self._perturbation = mujoco.MjvPerturb()
        visible = (model.geom_group > 0) & (model.geom_group < 3)
        reflecting = np.isin(model.geom_type, _REFLECTING) & (model.mat_reflectance[model.geom_matid] > 0)
        everything = bool((visible & reflecting & (model.geom_matid >= 0)).any() or model.light_castshadow.any())
        # Mirrors and shadows show what the camera does not see. Planes have no radius.
        self._cullable = np.flatnonzero(visible & (model.geom_rbound > 0)) if not everything else np.zeros(0, int)

    def render(self, name: str, height: int, width: int) -> np.ndarray:
        """Upright [height, width, 3] uint8 (a view; OpenGL's rows come bottom up)."""
        self._library.context.make_current()
        context, scene, model = self.context, self._scene, self.model
        if height > context.offHeight or width > context.offWidth:
            mujoco.mjr_resizeOffscreen(max(width, context.offWidth), max(height, context.offHeight), context)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
        self._camera.fixedcamid = camera
        unseen = self._unseen(camera, width / height)
        groups = model.geom_group[unseen]
        model.geom_group[unseen] = _HIDDEN_GROUP
        mujoco.mjv_updateScene(
            model, self.data, self._options, self._perturbation, self._camera, mujoco.mjtCatBit.mjCAT_ALL, scene
        )
        model.geom_group[unseen] = groups
        for geom in scene.geoms[: scene.ngeom]:
            if geom.type == _MESH:
                geom.dataid = self._lists[geom.dataid // 2]
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, scene, context)
        frame = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(frame, None, viewport, context)
        return frame[::-1]

    def _unseen(self, camera: int, aspect: float) -> np.ndarray:
        """Geoms whose bounding sphere is outside of the camera's view (which looks along its own -z)."""
        geoms = self._cullable
        relative = (self.data.geom_xpos[geoms] - self.data.cam_xpos[camera]) @ self.data.cam_xmat[camera].reshape(3, 3)
        tangent = np.tan(np.deg2rad(self.model.cam_fovy[camera]) / 2) * np.array([aspect, 1.0])
        outside = (np.abs(relative[:, :2]) + relative[:, 2:] * tangent) / np.sqrt(1 + tangent**2)
        farthest = np.maximum(outside.max(axis=1), relative[:, 2])
        return geoms[farthest > self.model.geom_rbound[geoms] + _MARGIN]

    def close(self) -> None:
        """Frees the frame buffers. Textures and meshes stay until the next scene has taken what it needs of them."""
        self._library.context.make_current()
        self._library.cameras.remove(self)
        self.context.texture[:] = self._own_textures
        self.context.free()
