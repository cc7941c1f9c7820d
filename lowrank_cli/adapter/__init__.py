"""The adapter core: one equation, and the ways to put it into a loaded model, save it and take it out again.

    y = W x + s · Σ_e  w_e ⊙ B_e ( g_e ⊙ (A_e drop(x)) )

Letters: B batch, T tokens, I in, O out, R rank, D width, N roles, L layers.
"""
