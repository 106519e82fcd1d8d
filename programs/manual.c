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

static void put_roff(FILE *out, const char *text) {
    if (*text == '.' || *text == '\'') fputs("\\&", out);
    for (; *text; text++) {
        if (*text == '-') fputs("\\-", out);
        else if (*text == '\\') fputs("\\e", out);
        else fputc(*text, out);
    }
}

static void put_option(FILE *out, const option_info *o) {
    char spelled[64];
    const char *p = NULL;
    fputs(".TP\n", out);
    for (uint32_t i = 0; next_spelling(spelled, o, &p, i); i++) {
        fputs(i ? ", \\fB" : "\\fB", out);
        put_roff(out, spelled);
        fputs("\\fR", out);
    }
    if (o->value) fprintf(out, " \\fI%s\\fR", o->value);
    fputc('\n', out);
    put_roff(out, o->help);
    if (o->env) fprintf(out, "; in the environment %s", o->env);
    fputc('\n', out);
}

static const char rest[] =
    ".SH ENVIRONMENT\nEvery option has an environment name, its own in capitals behind KIVI_, such "
    "as\n.BR KIVI_THREADS ;\nthe command line wins.\n.TP\n.B KIVI_DISABLE\nInstruction sets not to "
    "use: avx2, avx512, avx512vnni (x86-64), neon, neondot (aarch64); a set goes with all that "
    "are built on it. On a GPU: cudnn, and all prompts are attended by our own kernel.\n"
    ".TP\n.B KIVI_CACHE_DIR\nFolder of fetched models.\n.SH EXIT STATUS\n0 "
    "success, 2 usage, 3 the model, 4 memory or device, 5 input or output.\n";

static const char chat_part[] =
    ".SH CONVERSATION\nEach line is a turn. Lines that begin with a slash are commands:\n.TP\n"
    ".BI /save \" FILE\"\nkeep the conversation, with its cache\n.TP\n.BI /load \" FILE\"\ngo on "
    "with "
    "a saved one\n.TP\n.B /reset\nbegin anew\n.TP\n.B /stats\ntokens, speed and memory\n.TP\n"
    ".BR /help \", \" /quit\nlist these, and end. Ctrl\\-C ends an answer, Ctrl\\-D the program.\n";

static const char convert_part[] =
    "Reads\n.IR FOLDER ,\nwhich has config.json, safetensors and tokenizer.json, and writes one "
    "GGUF file that llama.cpp reads too. Vectors stay float32; with q4_0 the matrix that makes the "
    "logits is q8_0. The file has its name when it is whole; a failure leaves nothing. What GGUF "
    "has no name for, such as a pre\\-tokenizer, is refused.\n";

static const char attention_part[] =
    "Random data, no model; head size 128. A figure is the median of event-timed replays of a CUDA "
    "graph over more memory than the L2 cache has. What is measured:\n.TP\n.B decode\nattention of "
    "one new row of each sequence, pages alone\n.TP\n.B constant\nthe same, cut at constant "
    "lengths: no row depends on its neighbours\n.TP\n.B window\nthe same with the rows in 16 bit, "
    "R of the kind and 32\n.TP\n.B length\nwindow at 128 to 131,072 tokens, of the first "
    "kind\n.TP\n.B append\na row to each sequence, of one layer of 32: rope, window, codes "
    "of values\n.TP\n.B close\nthe keys of a page of each sequence in one layer become codes, as "
    "once in R rows\n.TP\n.B "
    "prompt\nattention of a whole prompt\n.PP\nBefore these, a stream that only reads, of which "
    "shares are given, and a copy.\n";

static void put_page(FILE *out, const command_line *c) {
    option_info o;
    fprintf(out, ".TH KIVI\\-%s 1 \"\" \"kivi " KIVI_VERSION "\"\n.SH NAME\nkivi\\-%s \\- ",
            c->name, c->name);
    put_roff(out, c->help);
    fprintf(out, "\n.SH SYNOPSIS\n.B kivi %s\n", c->name);
    if (*c->words) fprintf(out, ".I %s\n", c->words);
    fputs("[options]\n.SH DESCRIPTION\n", out);
    fputs(c->command == CMD_CONVERT           ? convert_part
          : c->command == CMD_BENCH_ATTENTION ? attention_part
                                              : ".I MODEL\nis a GGUF file, a Hugging Face "
                                                "folder, or smollm2.\n",
          out);
    fputs(".SH OPTIONS\n", out);
    for (size_t i = 0; options_get(&o, i); i++)
        if (o.commands & c->command) put_option(out, &o);
    if (c->command == CMD_CHAT) fputs(chat_part, out);
    fputs(rest, out);
    fputs(".SH SEE ALSO\n.BR kivi (1)\n", out);
}

static void put_main_page(FILE *out) {
    command_line c;
    fputs(".TH KIVI 1 \"\" \"kivi " KIVI_VERSION "\"\n.SH NAME\nkivi \\- language models with a "
          "2\\-bit key/value cache\n.SH SYNOPSIS\n.B kivi\n.I COMMAND MODEL\n[options]\n"
          ".SH COMMANDS\n",
          out);
    for (size_t i = 0; options_command(&c, i); i++) {
        fprintf(out, ".TP\n.BR kivi\\-%s (1)\n", c.name);
        put_roff(out, c.help);
        fputc('\n', out);
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
