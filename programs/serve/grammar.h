/* grammar.h: which tokens may come next when the output must follow a grammar.
 *
 * A grammar is a graph of nodes over bytes: sets, literals, sequences, choices and repetitions;
 * recursion is an edge back. What has been matched is a set of stacks (node, place in it, what
 * comes after); sets and stacks are kept once each and numbered, so the machine is a finite
 * automaton that is made as it is used: a transition is computed when it is first asked for. The
 * tokens allowed in a state are found by one walk over the sorted vocabulary and kept for the next
 * time; inside a long string every step is then one look-up. */
#ifndef SERVE_GRAMMAR_H
#define SERVE_GRAMMAR_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- the vocabulary, sorted by bytes; shared by all grammars and threads once made ---- */
typedef struct token_table token_table;
/* bytes_of: the token's bytes, 0 for one that text never has (control tokens). */
token_table *token_table_create(uint32_t n_vocab,
                                size_t (*bytes_of)(void *user, int32_t id, char *out,
                                                   size_t max_bytes),
                                void *user);
void token_table_destroy(token_table **table);

/* ---- building ---- */
typedef struct grammar grammar;
typedef struct node node;
grammar *grammar_create(const token_table *table);
void grammar_destroy(grammar **g);
/* Nodes belong to the grammar. All calls take NULL for a node that could not be made and return
 * NULL then, or when there is no memory or the grammar has too many nodes. */
node *grammar_set(grammar *g, const char *ranges); /* pairs of bytes, "azAZ" */
node *grammar_range(grammar *g, unsigned first, unsigned last);
node *grammar_literal(grammar *g, const char *bytes, size_t n_bytes);
node *grammar_sequence(grammar *g, size_t n, node *const *parts); /* n 0: nothing, always there */
node *grammar_choice(grammar *g, size_t n, node *const *parts);
enum { GRAMMAR_MANY = UINT32_MAX };
node *grammar_repeat(grammar *g, node *part, uint32_t min, uint32_t max);
/* A place for a node that is made later: recursion. */
node *grammar_forward(grammar *g);
void grammar_resolve(node *forward, node *target);
/* Fixes the start. False: a node can come back to itself without a byte in between, or an earlier
 * call failed. */
bool grammar_start(grammar *g, node *start);

/* ---- running: one grammar for one sequence; a fork copies the state's number ---- */
enum { GRAMMAR_DEAD = -1 };
int32_t grammar_first(grammar *g); /* the state at the beginning; GRAMMAR_DEAD without memory */
/* The state after a token's bytes; GRAMMAR_DEAD when they do not fit. */
int32_t grammar_next(grammar *g, int32_t state, const char *bytes, size_t n_bytes);
bool grammar_may_end(const grammar *g, int32_t state);
bool grammar_must_end(const grammar *g, int32_t state); /* nothing can follow */
/* One bit a token id, [(V + 31) / 32] words: those that may come next, lent until the next call.
 * NULL: no memory. */
const uint32_t *grammar_allowed(grammar *g, int32_t state);

#endif
