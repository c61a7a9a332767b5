"""All losses beside cross-entropy, by the name that they have in a method's parameters."""

from pipeline.methods.at import AtTerm
from pipeline.methods.bss import BssTerm
from pipeline.methods.dkd import DkdTerm
from pipeline.methods.fitnet import FitNetTerm
from pipeline.methods.fsp import FspTerm
from pipeline.methods.hinton import HintonTerm
from pipeline.methods.rkd import RkdTerm
from pipeline.term import Term

TERMS: dict[str, type[Term]] = {
    "hinton": HintonTerm,
    "bss": BssTerm,
    "fitnet": FitNetTerm,
    "at": AtTerm,
    "fsp": FspTerm,
    "dkd": DkdTerm,
    "rkd": RkdTerm,
}
