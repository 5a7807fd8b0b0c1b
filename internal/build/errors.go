package build

import (
	"errors"
	"fmt"
	"strings"

	"conex/internal/dockerfile"
)

var (
	// ErrNotFound says that a source of COPY or ADD does not exist in the context, stage or image.
	ErrNotFound = errors.New("not found")
	// ErrNoDockerfile says that there is no Dockerfile where one was looked for.
	ErrNoDockerfile = errors.New("no Dockerfile")
	// ErrNoTarget says that --target names no stage.
	ErrNoTarget = errors.New("target stage")
	// ErrUnsupported says that an instruction asks for what conex can't do yet.
	ErrUnsupported = errors.New("not supported yet")
)

// StepError says which step of a Dockerfile failed and why, with all that a user needs to see.
type StepError struct {
	// File is the Dockerfile's name and Line where the instruction begins in it, from 1.
	File string
	Line int
	// Excerpt shows the lines around it; see dockerfile.File.Excerpt.
	Excerpt string
	// Instruction is the step's title, as in "RUN npm ci".
	Instruction string
	// Output is the end of what the step wrote, at most some 40 lines; "" for anything but RUN.
	Output string
	// ExitCode is the exit code of a RUN's command, 0 when the step failed otherwise.
	ExitCode int
	// Err is the reason.
	Err error
}

// Error is several lines: the step and the reason, the last output, the excerpt.
func (e *StepError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s:%d: %s: %v", e.File, e.Line, firstLine(e.Instruction), e.Err)
	if e.Output != "" {
		fmt.Fprintf(&b, "\n--- last output ---\n%s\n-------------------", strings.TrimRight(e.Output, "\n"))
	}
	if e.Excerpt != "" {
		b.WriteString("\n" + e.Excerpt)
	}
	return b.String()
}

// Unwrap returns the reason.
func (e *StepError) Unwrap() error { return e.Err }

// exitError is the reason of a RUN whose command ended with a code other than 0.
type exitError struct {
	command string
	code    int
	output  string
}

func (e *exitError) Error() string {
	return fmt.Sprintf("process %q did not complete successfully: exit code: %d", e.command, e.code)
}

// stepError gives err a step's place, unless it has one already or is only the echo of a cancellation.
func stepError(f *dockerfile.File, s dockerfile.Step, title string, err error) error {
	var have *StepError
	var parse *dockerfile.ParseError
	if err == nil || errors.As(err, &have) || errors.As(err, &parse) {
		return err
	}
	e := &StepError{File: f.Name, Line: s.Lines.First, Excerpt: f.Excerpt(s.Lines), Instruction: title, Err: err}
	var exit *exitError
	if errors.As(err, &exit) {
		e.Output, e.ExitCode = exit.output, exit.code
	}
	return e
}

// Place is where in the Dockerfile an error is to blame, the zero value for nowhere.
func Place(err error) dockerfile.Lines {
	var step *StepError
	var parse *dockerfile.ParseError
	switch {
	case errors.As(err, &step):
		return dockerfile.Lines{First: step.Line, Last: step.Line}
	case errors.As(err, &parse):
		return parse.Lines
	}
	return dockerfile.Lines{}
}

func firstLine(s string) string {
	line, rest, more := strings.Cut(s, "\n")
	if more && strings.TrimSpace(rest) != "" {
		return line + " ..."
	}
	return line
}
