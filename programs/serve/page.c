/* page.c: the chat page, as it stands in page.html. */
#include "http.h"

__asm__(".section .rodata\n"
        ".globl page_html\n"
        "page_html: .incbin \"programs/serve/page.html\"\n"
        "page_html_end: .byte 0\n"
        ".balign 4\n"
        ".globl page_html_bytes\n"
        "page_html_bytes: .int page_html_end - page_html\n"
        ".text\n");
