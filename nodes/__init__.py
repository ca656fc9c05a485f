"""The ComfyUI nodes: one file per group, each node a schema and a short `execute`."""

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyConceptTokens
from .dataset import SaveConceptTrainingSet
from .demo import ConceptDemoScene, LoadConceptDemoModel
from .discover import DiscoverConcepts
from .evaluate import EvaluateConcepts
from .examples import ConceptExample
from .extract import ExtractLatentMasks
from .files import LoadConcepts, SaveConcepts
from .learn import LearnConcepts
from .learn_visual import LearnVisualCondition
from .masks import CompareConceptMasks, RefineCRF
from .notices import listen
from .picking import ConceptMaskByName
from .settings import ConceptSettings
from .training import MaskTrainingConditioning
from .visual import ApplyVisualCondition
from .visual_files import LoadVisualCondition, SaveVisualCondition

NODES: list[type[io.ComfyNode]] = [
    ConceptExample,
    LearnConcepts,
    ConceptSettings,
    ExtractLatentMasks,
    DiscoverConcepts,
    ConceptMaskByName,
    RefineCRF,
    ApplyConceptTokens,
    SaveConcepts,
    LoadConcepts,
    EvaluateConcepts,
    LearnVisualCondition,
    ApplyVisualCondition,
    SaveVisualCondition,
    LoadVisualCondition,
    LoadConceptDemoModel,
    ConceptDemoScene,
    CompareConceptMasks,
    MaskTrainingConditioning,
    SaveConceptTrainingSet,
]


class VisualConcepts(ComfyExtension):
    """The extension that ComfyUI loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        listen()
        return NODES
