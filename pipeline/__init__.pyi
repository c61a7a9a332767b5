from .core.errors import PipelineError as PipelineError
from .core.parameters import Layers as Layers
from .core.parameters import Params as Params
from .core.parameters import Section as Section
from .core.parameters import load_params as load_params
from .core.status import Status as Status
from .evaluate.metrics import AngSim as AngSim
from .evaluate.metrics import MagSim as MagSim
from .evaluate.similarity import angle_similarity as angle_similarity
from .evaluate.similarity import magnitude_similarity as magnitude_similarity
from .images.pixels import pixels as pixels
from .losses.bss import BoundaryLoss as BoundaryLoss
from .losses.hinton import softened_cross_entropy as softened_cross_entropy
from .networks.weights import load_weights as load_weights
from .networks.weights import save_weights as save_weights
from .search.boundary import SearchResult as SearchResult
from .search.find import find_boundary as find_boundary
from .shards.reader import BoundaryShards as BoundaryShards
from .shards.stream import StreamedShards as StreamedShards
from .training.term import FeatureShapes as FeatureShapes
from .training.term import Step as Step
from .training.term import Term as Term

__version__: str
