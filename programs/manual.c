/* manual: the option table as man pages and as completions for bash, zsh and fish, so that none of
 * them can know less than the parser does. */
#include "options.h"

#include <string.h>

/* Prints text with a backslash before each of `marks`. */
static void put_escaped(FILE *out, const char *text, const char *marks, const char *escape) {
    for (; *text; text++) {
        if (strchr(marks, *text)) fputs(escape, out);
        fputc(*text, out);
    }
}

static bool takes_file(const option_info *o) { return o->value && !strcmp(o->value, "FILE"); }

/* The next spelling of an option with its dashes; *p walks through o->shorts. False: no more. */
static bool next_spelling(char out[64], const option_info *o, const char **p, uint32_t i) {
    if (i == 0) {
        snprintf(out, 64, "--%s", o->name);
        *p = o->shorts;
        return true;
    }
    size_t n = strcspn(*p, " ");
    if (n == 0) return false;
    snprintf(out, 64, "%.*s", (int)n, *p);
    *p += n + ((*p)[n] == ' ');
    return true;
}

/* ---- man pages ---- */

/* In scdoc's format (scdoc(5)), of which scdoc makes the page. */
static void put_scdoc(FILE *out, const char *text) { put_escaped(out, text, "\\*_`", "\\"); }

static void put_option(FILE *out, const option_info *o) {
    char spelled[64];
    const char *p = NULL;
    for (uint32_t i = 0; next_spelling(spelled, o, &p, i); i++)
        fprintf(out, "%s*%s*", i ? ", " : "", spelled);
    if (o->value) {
        fputs(" _", out);
        put_escaped(out, o->value, "\\_", "\\");
        fputc('_', out);
    }
    fputs("\n\t", out);
    put_scdoc(out, o->help);
    if (o->env) {
        fputs("; in the environment ", out);
        put_scdoc(out, o->env);
    }
    fputs("\n\n", out);
}

static const char rest[] =
    "# ENVIRONMENT\n\nEvery option has an environment name, its own in capitals behind KIVI\\_, "
    "such as *KIVI_THREADS*; the command line wins.\n\n"
    "*KIVI_DISABLE*\n\tInstruction sets not to use: avx2, avx512, avx512vnni (x86-64), neon, "
    "neondot (aarch64); a set goes with all that are built on it. On a GPU: cudnn, and all "
    "prompts are attended by our own kernel.\n\n"
    "*KIVI_CACHE_DIR*\n\tFolder of fetched models.\n\n"
    "# EXIT STATUS\n\n0 success, 2 usage, 3 the model, 4 memory or device, 5 input or output.\n";

static const char chat_part[] =
    "# CONVERSATION\n\nEach line is a turn. Lines that begin with a slash are commands:\n\n"
    "*/save* _FILE_\n\tkeep the conversation, with its cache\n\n"
    "*/load* _FILE_\n\tgo on with a saved one; if that fails, with this one\n\n"
    "*/reset*\n\tbegin anew\n\n*/stats*\n\ttokens, speed and memory\n\n"
    "*/help*, */quit*\n\tlist these, and end. Ctrl-C ends an answer, Ctrl-D the program.\n\n";

static const char convert_part[] =
    "Reads _FOLDER_, which has config.json, safetensors and tokenizer.json, and writes one GGUF "
    "file that llama.cpp reads too. Vectors stay float32; with q4\\_0 the matrix that makes the "
    "logits is q8\\_0. The file has its name when it is whole; a failure leaves nothing. What "
    "GGUF has no name for, such as a pre-tokenizer, is refused.\n\n";

static const char attention_part[] =
    "Random data, no model; head size 128. A figure is the median of event-timed replays of a CUDA "
    "graph over more memory than the L2 cache has. What is measured:\n\n"
    "*decode*\n\tattention of one new row of each sequence, pages alone\n\n"
    "*constant*\n\tthe same, cut at constant lengths: no row depends on its neighbours\n\n"
    "*window*\n\tthe same with the rows in 16 bit, R of the kind and 32\n\n"
    "*length*\n\twindow at 128 to 131,072 tokens, of the first kind\n\n"
    "*append*\n\ta row to each sequence, of one layer of 32: rope, window, codes of values\n\n"
    "*close*\n\tthe keys of a page of each sequence in one layer become codes, as once in R "
    "rows\n\n"
    "*prompt*\n\tattention of a whole prompt\n\n"
    "Before these, a stream that only reads, of which shares are given, and a copy.\n\n";

static void put_page(FILE *out, const command_line *c) {
    option_info o;
    fprintf(out, "KIVI-%s(1) \"kivi " KIVI_VERSION "\"\n\n# NAME\n\nkivi-%s - ", c->name, c->name);
    put_scdoc(out, c->help);
    fprintf(out, "\n\n# SYNOPSIS\n\n*kivi %s* ", c->name);
    if (*c->words) fprintf(out, "_%s_ ", c->words);
    fputs("[options]\n\n# DESCRIPTION\n\n", out);
    fputs(c->command == CMD_CONVERT           ? convert_part
          : c->command == CMD_BENCH_ATTENTION ? attention_part
                                              : "_MODEL_ is a GGUF file, a Hugging Face folder, or "
                                                "smollm2.\n\n",
          out);
    fputs("# OPTIONS\n\n", out);
    for (size_t i = 0; options_get(&o, i); i++)
        if (o.commands & c->command) put_option(out, &o);
    if (c->command == CMD_CHAT) fputs(chat_part, out);
    fputs(rest, out);
    fputs("\n# SEE ALSO\n\n*kivi*(1)\n", out);
}

static void put_main_page(FILE *out) {
    command_line c;
    fputs("KIVI(1) \"kivi " KIVI_VERSION "\"\n\n# NAME\n\nkivi - language models with a 2-bit "
          "key/value cache\n\n# SYNOPSIS\n\n*kivi* _COMMAND_ _MODEL_ [options]\n\n# COMMANDS\n\n",
          out);
    for (size_t i = 0; options_command(&c, i); i++) {
        fprintf(out, "*kivi-%s*(1)\n\t", c.name);
        put_scdoc(out, c.help);
        fputs("\n\n", out);
    }
    fputs(rest, out);
}

int manual_page(FILE *out, const char *command) {
    command_line c;
    if (!command) {
        put_main_page(out);
        return EXIT_OK;
    }
    for (size_t i = 0; options_command(&c, i); i++)
        if (!strcmp(c.name, command)) {
            put_page(out, &c);
            return EXIT_OK;
        }
    return usage_error("--man: unknown command '%s'", command);
}

/* ---- bash ---- */

/* All spellings of options that want (files: a file; else any other value), as a case pattern. */
static void put_bash_values(FILE *out, unsigned command, bool files, const char *action) {
    option_info o;
    char spelled[64];
    const char *p = NULL, *bar = "            ";
    for (size_t i = 0; options_get(&o, i); i++) {
        if (!(o.commands & command) || !o.value || takes_file(&o) != files) continue;
        for (uint32_t k = 0; next_spelling(spelled, &o, &p, k); k++, bar = "|")
            fprintf(out, "%s%s", bar, spelled);
    }
    if (*bar == '|') fprintf(out, ") %s ;;\n", action);
}

static void put_bash_command(FILE *out, const command_line *c) {
    option_info o;
    char spelled[64];
    const char *p = NULL;
    fprintf(out, "    %s)\n        options='--help", c->name);
    for (size_t i = 0; options_get(&o, i); i++)
        for (uint32_t k = 0; (o.commands & c->command) && next_spelling(spelled, &o, &p, k); k++)
            fprintf(out, " %s", spelled);
    fputs("'\n        case $prev in\n", out);
    put_bash_values(out, c->command, true, "COMPREPLY=($(compgen -f -- \"$cur\")); return");
    put_bash_values(out, c->command, false, "return");
    fputs("        esac ;;\n", out);
}

static void put_bash(FILE *out) {
    command_line c;
    fputs("# bash completion for kivi; made by `kivi --completion bash`\n_kivi() {\n"
          "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} options=\n"
          "    COMPREPLY=()\n    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
          "        COMPREPLY=($(compgen -W '",
          out);
    for (size_t i = 0; options_command(&c, i); i++) fprintf(out, "%s ", c.name);
    fputs("--help --version --completion --man' -- \"$cur\"))\n        return\n    fi\n"
          "    case ${COMP_WORDS[1]} in\n",
          out);
    for (size_t i = 0; options_command(&c, i); i++) put_bash_command(out, &c);
    fputs("    --completion) options='bash zsh fish' ;;\n    esac\n"
          "    if [[ $cur == -* || ${COMP_WORDS[1]} == --* ]]; then\n"
          "        COMPREPLY=($(compgen -W \"$options\" -- \"$cur\"))\n    else\n"
          "        COMPREPLY=($(compgen -f -W smollm2 -- \"$cur\"))\n    fi\n}\n"
          "complete -o filenames -F _kivi kivi\n",
          out);
}

/* ---- zsh ---- */

static void put_zsh_option(FILE *out, const option_info *o) {
    char spelled[64];
    const char *p = NULL;
    for (uint32_t k = 0; next_spelling(spelled, o, &p, k); k++) {
        fprintf(out, " \\\n            '%s[", spelled);
        for (const char *h = o->help; *h; h++) {
            if (*h == '\'') fputs("'\\'", out); /* end the quotes, a quoted one, begin them */
            else if (strchr("[]:\\", *h)) fputc('\\', out);
            fputc(*h, out);
        }
        fputs("]", out);
        if (o->value) fprintf(out, ":%s:%s", o->value, takes_file(o) ? "_files" : "");
        fputc('\'', out);
    }
}

static void put_zsh(FILE *out) {
    command_line c;
    option_info o;
    fputs("#compdef kivi\n# made by `kivi --completion zsh`\n_kivi() {\n    local -a commands\n"
          "    commands=(\n",
          out);
    for (size_t i = 0; options_command(&c, i); i++) {
        fprintf(out, "        '%s:", c.name);
        put_escaped(out, c.help, "':", "\\");
        fputs("'\n", out);
    }
    fputs("    )\n    if (( CURRENT == 2 )); then\n        _describe command commands\n"
          "        return\n    fi\n    shift words\n    (( CURRENT-- ))\n    case $words[1] in\n",
          out);
    for (size_t i = 0; options_command(&c, i); i++) {
        fprintf(out, "    %s)\n        _arguments '*:model:_files'", c.name);
        for (size_t k = 0; options_get(&o, k); k++)
            if (o.commands & c.command) put_zsh_option(out, &o);
        fputs(" ;;\n", out);
    }
    fputs("    esac\n}\n_kivi \"$@\"\n", out);
}

/* ---- fish ---- */

static void put_fish_option(FILE *out, const option_info *o, const char *command) {
    char spelled[64];
    const char *p = NULL;
    fprintf(out, "complete -c kivi -n '__fish_seen_subcommand_from %s'", command);
    for (uint32_t k = 0; next_spelling(spelled, o, &p, k); k++) {
        bool is_long = spelled[1] == '-';
        fprintf(out, " %s %s", is_long ? "-l" : spelled[2] ? "-o" : "-s", spelled + 1 + is_long);
    }
    fputs(!o->value ? " -d '" : takes_file(o) ? " -r -F -d '" : " -x -d '", out);
    put_escaped(out, o->help, "'\\", "\\");
    fputs("'\n", out);
}

static void put_fish(FILE *out) {
    command_line c;
    option_info o;
    fputs("# fish completion for kivi; made by `kivi --completion fish`\n", out);
    for (size_t i = 0; options_command(&c, i); i++) {
        fprintf(out, "complete -c kivi -n __fish_use_subcommand -f -a %s -d '", c.name);
        put_escaped(out, c.help, "'\\", "\\");
        fputs("'\n", out);
        for (size_t k = 0; options_get(&o, k); k++)
            if (o.commands & c.command) put_fish_option(out, &o, c.name);
    }
}

int manual_completion(FILE *out, const char *shell) {
    command_line c;
    if (shell && !strcmp(shell, "bash")) put_bash(out);
    else if (shell && !strcmp(shell, "zsh")) put_zsh(out);
    else if (shell && !strcmp(shell, "fish")) put_fish(out);
    else if (shell && !strcmp(shell, "names")) /* for `make install` */
        for (size_t i = 0; options_command(&c, i); i++) fprintf(out, "%s\n", c.name);
    else return usage_error("--completion: expected bash, zsh or fish");
    return EXIT_OK;
}
