"""The stages that a graph goes through, in order.

``before_autograd``  decide on norms of a graph that is differentiated; put estimates into it
``insert``           MX casts for plain linears
``match``            one fusion or one reason per norm; changes nothing
``rewrite``          edit the fusions in; never declines
``mx_linears``       in inference, linears on values and scales in the place of matmuls
``joint``            these four, over one graph, with the report
``verify``           check the result, if asked to
``lower``            a kernel or ATen ops in the place of each op
"""
