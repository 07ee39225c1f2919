"""Block-sparse flash attention: public function, call, operator, backends."""

from flashmark.block_sparse.attention import block_sparse_attention

__all__ = ["block_sparse_attention"]
