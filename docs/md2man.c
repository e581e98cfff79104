/*
 * md2man: makes a manual page of one of these documents, or of some of its chapters. For the build; it knows what they are written with, no more.
 *
 *     md2man FILE.md NAME SECTION SUMMARY [CHAPTER...]      to stdout; CHAPTER is the text behind "## "
 *
 * Exit status 1 if the file cannot be read, or has no such chapter.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_CELLS 8

enum block { BLOCK_NONE, BLOCK_TEXT, BLOCK_CODE, BLOCK_TABLE, BLOCK_LIST };

struct page {
	char **chapters; /* that are wanted; none: all */
	int chapter_count, found;
	bool wanted, fenced;
	enum block block;
	char heads[MAX_CELLS][128]; /* of the table */
	bool heads_read;
};

static bool begins(const char *text, const char *with) { return !strncmp(text, with, strlen(with)); }

static void put_char(char c)
{
	switch (c) {
	case '\\':
		fputs("\\e", stdout);
		break;
	case '-':
		fputs("\\-", stdout);
		break;
	case '~':
		fputs("\\(ti", stdout);
		break;
	case '^':
		fputs("\\(ha", stdout);
		break;
	case '\'':
		fputs("\\(aq", stdout);
		break;
	default:
		putchar(c);
	}
}

static void put_code_line(const char *text)
{
	if (text[0] == '.' || text[0] == '\'')
		fputs("\\&", stdout);
	for (; *text; text++)
		put_char(*text);
	putchar('\n');
}

/* `code`, **bold**, *italic* and [links](to), which lose where they lead. */
static void put_text(const char *text)
{
	bool code = false, bold = false, italic = false;

	if (text[0] == '.' || text[0] == '\'')
		fputs("\\&", stdout);
	for (; *text; text++) {
		const char *close = *text == '[' && !code ? strstr(text, "](") : NULL;

		if (*text == '`') {
			code = !code;
			fputs(code ? "\\fB" : "\\fR", stdout);
		} else if (!code && begins(text, "**")) {
			bold = !bold;
			fputs(bold ? "\\fB" : "\\fR", stdout);
			text++;
		} else if (!code && *text == '*' && (italic || (text[1] != ' ' && text[1]))) {
			italic = !italic;
			fputs(italic ? "\\fI" : "\\fR", stdout);
		} else if (close && strchr(close, ')')) {
			for (const char *p = text + 1; p < close; p++)
				if (*p != '`')
					put_char(*p);
			text = strchr(close, ')');
		} else if (begins(text, "\\|"))
			continue;
		else
			put_char(*text);
	}
	if (code || bold || italic)
		fputs("\\fR", stdout);
}

static void end_block(struct page *page)
{
	if (page->block == BLOCK_CODE)
		puts(".EE");
	page->block = BLOCK_NONE;
}

/* Cells of a row, without the white space around them. Bars in `code` and \| are none. */
static unsigned split(char *row, char *cells[MAX_CELLS])
{
	unsigned count = 0;
	bool code = false;
	char *start = row + 1;

	for (char *p = row + 1; *p && count < MAX_CELLS; p++) {
		code ^= *p == '`';
		if (*p != '|' || code || p[-1] == '\\')
			continue;
		*p = '\0';
		start += strspn(start, " ");
		for (char *end = p; end > start && end[-1] == ' ';)
			*--end = '\0';
		cells[count++] = start;
		start = p + 1;
	}
	return count;
}

/* The first cell is what the others, headed by the table's head, are about. */
static void put_row(struct page *page, char *row)
{
	char *cells[MAX_CELLS];
	unsigned count = split(row, cells);

	if (page->block != BLOCK_TABLE) {
		end_block(page);
		page->block = BLOCK_TABLE;
		for (unsigned i = 0; i < count; i++)
			snprintf(page->heads[i], sizeof(page->heads[i]), "%s", cells[i]);
		page->heads_read = false;
		return;
	}
	if (!page->heads_read) { /* |---|---| */
		page->heads_read = true;
		return;
	}
	if (count == 0)
		return;
	puts(".TP");
	put_text(*cells[0] ? cells[0] : "(nothing)");
	putchar('\n');
	for (unsigned i = 1; i < count; i++) {
		if (!*cells[i])
			continue;
		if (count > 2 && page->heads[i][0]) {
			if (i > 1)
				puts(".br");
			put_text(page->heads[i]);
			fputs(": ", stdout);
		}
		put_text(cells[i]);
		putchar('\n');
	}
}

static void put_heading(struct page *page, const char *line)
{
	end_block(page);
	fputs(begins(line, "### ") ? ".SS " : ".SH ", stdout);
	put_text(line + (begins(line, "### ") ? 4 : 3));
	putchar('\n');
}

static bool is_chapter_wanted(struct page *page, const char *title)
{
	for (int i = 0; i < page->chapter_count; i++)
		if (!strcmp(page->chapters[i], title)) {
			page->found++;
			return true;
		}
	return page->chapter_count == 0;
}

static void put_line(struct page *page, char *line)
{
	if (begins(line, "```")) {
		page->fenced = !page->fenced;
		end_block(page);
		if (page->fenced) {
			puts(".PP\n.EX");
			page->block = BLOCK_CODE;
		}
	} else if (page->fenced) {
		put_code_line(line);
	} else if (begins(line, "    ") && page->block != BLOCK_LIST) {
		if (page->block != BLOCK_CODE)
			puts(".PP\n.EX");
		page->block = BLOCK_CODE;
		put_code_line(line);
	} else if (!*line) {
		if (page->block == BLOCK_CODE) /* it may go on behind it */
			puts("");
		else
			end_block(page);
	} else if (line[0] == '|') {
		put_row(page, line);
	} else if (begins(line, "- ")) {
		end_block(page);
		page->block = BLOCK_LIST;
		puts(".IP \\(bu 2");
		put_text(line + 2);
		putchar('\n');
	} else {
		if (page->block == BLOCK_CODE || page->block == BLOCK_TABLE)
			end_block(page);
		if (page->block == BLOCK_NONE)
			puts(".PP");
		page->block = page->block == BLOCK_LIST ? BLOCK_LIST : BLOCK_TEXT;
		put_text(line + strspn(line, " "));
		putchar('\n');
	}
}

static void put_title(char **argv)
{
	printf(".TH \"");
	for (const char *p = argv[2]; *p; p++)
		put_char(*p >= 'a' && *p <= 'z' ? (char)(*p - 'a' + 'A') : *p);
	printf("\" %s \"\" \"vmcp %s\" \"vmcp\"\n.SH NAME\n", argv[3], VMCP_VERSION);
	put_text(argv[2]);
	fputs(" \\- ", stdout);
	put_text(argv[4]);
	puts("\n.SH DESCRIPTION");
}

int main(int argc, char **argv)
{
	struct page page = {0};
	char *line = NULL;
	size_t capacity = 0;
	ssize_t length;

	if (argc < 5) {
		fprintf(stderr, "usage: md2man FILE.md NAME SECTION SUMMARY [CHAPTER...]\n");
		return 2;
	}
	FILE *file = fopen(argv[1], "r");
	if (!file) {
		perror(argv[1]);
		return 1;
	}
	page.chapters = argv + 5;
	page.chapter_count = argc - 5;
	page.wanted = page.chapter_count == 0;
	put_title(argv);
	while ((length = getline(&line, &capacity, file)) > 0) {
		if (line[length - 1] == '\n')
			line[length - 1] = '\0';
		if (!page.fenced && begins(line, "## "))
			page.wanted = is_chapter_wanted(&page, line + 3);
		if (!page.wanted || (!page.fenced && begins(line, "# ")))
			continue;
		if (!page.fenced && (begins(line, "## ") || begins(line, "### ")))
			put_heading(&page, line);
		else
			put_line(&page, line);
	}
	end_block(&page);
	puts(".SH SEE ALSO\n.BR vmcp (1)");
	free(line);
	fclose(file);
	if (page.found != page.chapter_count) {
		fprintf(stderr, "md2man: %s: %d of %d chapters are not there\n", argv[1], page.chapter_count - page.found, page.chapter_count);
		return 1;
	}
	return 0;
}
