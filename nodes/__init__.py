"""The ComfyUI nodes: one file per group, each node a schema and a short `execute`."""

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyConceptTokens
from .dataset import SaveTrainingSet
from .demo import DemoScene, LoadDemoModel
from .discover import DiscoverConcepts
from .evaluate import EvaluateConcepts
from .examples import ConceptExample
from .extract import ExtractLatentMasks
from .files import LoadConcepts, SaveConcepts
from .learn import LearnConcepts
from .masks import CompareMasks, RefineCRF
from .notices import listen
from .training import MaskTrainingConditioning
from .visual import ApplyVisualCondition, LearnVisualCondition
from .visual_files import LoadVisualCondition, SaveVisualCondition

NODES: list[type[io.ComfyNode]] = [
    ConceptExample,
    LearnConcepts,
    ExtractLatentMasks,
    DiscoverConcepts,
    RefineCRF,
    ApplyConceptTokens,
    SaveConcepts,
    LoadConcepts,
    EvaluateConcepts,
    LearnVisualCondition,
    ApplyVisualCondition,
    SaveVisualCondition,
    LoadVisualCondition,
    LoadDemoModel,
    DemoScene,
    CompareMasks,
    MaskTrainingConditioning,
    SaveTrainingSet,
]


class VisualConcepts(ComfyExtension):
    """The extension that ComfyUI loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        listen()
        return NODES
