package dockerfile

import (
	"fmt"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// directives reads syntax and check; escape is the parser's.
func (f *File) directives() {
	// The first directive also counts in the comments of other languages, since it says that the file is not a Dockerfile.
	if _, v, at, ok := parser.DetectSyntax(f.Source); ok {
		f.Syntax, f.SyntaxLine = v, 1
		if len(at) > 0 {
			f.SyntaxLine = max(at[0].Start.Line, 1)
		}
	}
	if v, _, at, ok := parser.ParseDirective("check", f.Source); ok {
		f.checks, f.checksLine = v, 1
		if len(at) > 0 {
			f.checksLine = max(at[0].Start.Line, 1)
		}
	}
}

// OwnSyntax reports whether a front end, as the syntax directive and BUILDKIT_SYNTAX name it, is the one for Dockerfiles, in whatever
// version and from whatever registry: it is built in.
func OwnSyntax(syntax string) bool {
	ref, _, _ := strings.Cut(strings.TrimSpace(syntax), " ")
	ref, _, _ = strings.Cut(ref, "@")
	name := ref[strings.LastIndexByte(ref, '/')+1:]
	name, _, _ = strings.Cut(name, ":")
	return name == "dockerfile" || name == "dockerfile-upstream" || name == ""
}

// foreign adds to an error of the grammar that the file was written for another front end.
func (f *File) foreign(err error) error {
	if f.Syntax == "" || OwnSyntax(f.Syntax) {
		return err
	}
	return fmt.Errorf("%w (line %d asks for the front end %s, but conex reads Dockerfiles only)", err, f.SyntaxLine, shorten(f.Syntax))
}
