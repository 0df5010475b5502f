"""The paper: how a position embedding (PE) reaches the layers of a vision transformer.

    Eq. (5)   LaPE    x_0 = patches                                       input_pe=False
    Eq. (6)   LaPE    layer l attends to  LN_l(x_l) + LN'_l(pos)          first_layer=0
    Eq. (7)   LaPE    pos of layer l + 1  is  LN'_l(pos of layer l)       hierarchical=True
    Eq. (8)   PVG     x_0 = patches + pos_0                               input_pe=True
    Eq. (9)   PVG     layer l attends to  LN_l(x_l) + LN'_l(pos_{l-1})    first_layer=1
    Eq. (10)  PVG     pos_l = LN'_l(pos_{l-1}),  l = 1..L                 hierarchical=True
    Eq. (11)  MPVG    y = LN(x_{L+1}) + LN'_last(pos_0)                   last_index=0

LN'_l is a separate LayerNorm, next to the layer's own LN_l. L is the index of the last layer (11 of 12). pos_0 is
always the raw PE, and pos_k is what layer k receives. No pos_l depends on an image, so the chain is computed once,
before layer 0, and a network only receives finished values. A method is therefore data: no code outside this package
asks for its name.

`spec` says what a method delivers, `chain` computes it. They import torch and the standard library only.
"""

from mpvg.delivery.chain import TABLE_STD, DeliveredPE, PositionDelivery, empty_table
from mpvg.delivery.spec import (
    METHODS,
    DeliverySpec,
    Method,
    NetworkTraits,
    Pool,
    as_spec,
    describe,
    describe_spec,
    resolve,
)

__all__ = [
    "METHODS",
    "TABLE_STD",
    "DeliveredPE",
    "DeliverySpec",
    "Method",
    "NetworkTraits",
    "Pool",
    "PositionDelivery",
    "as_spec",
    "describe",
    "describe_spec",
    "empty_table",
    "resolve",
]
