package engine

import (
	"errors"
	"fmt"

	"conex/internal/container"
	"conex/internal/image"
	"conex/internal/network"
	"conex/internal/volume"
)

var (
	// ErrNotFound says that a container, image, network or volume does not exist.
	ErrNotFound = errors.New("not found")
	// ErrConflict says that something's present state or name forbids the action.
	ErrConflict = errors.New("conflict")
	// ErrInvalid says that a request makes no sense.
	ErrInvalid = errors.New("invalid request")
)

// ExitError is an error that decides the command's exit code: 125 when a container could not be started, 126 and 127 when its
// command could not be executed.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string { return e.Err.Error() }

// Unwrap returns the reason.
func (e *ExitError) Unwrap() error { return e.Err }

// kindError gives an error one of the package's kinds without changing its words.
type kindError struct {
	kind, err error
}

func (e *kindError) Error() string { return e.err.Error() }

func (e *kindError) Is(target error) bool { return target == e.kind }

func (e *kindError) Unwrap() error { return e.err }

func invalid(format string, args ...any) error {
	return &kindError{ErrInvalid, fmt.Errorf(format, args...)}
}

func conflict(format string, args ...any) error {
	return &kindError{ErrConflict, fmt.Errorf(format, args...)}
}

// classify adds the kind to the errors of the stores below.
func classify(err error) error {
	is := func(kind error, targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return !errors.Is(err, kind)
			}
		}
		return false
	}
	switch {
	case err == nil:
		return nil
	case is(ErrNotFound, container.ErrNotFound, image.ErrNotFound, network.ErrNotFound, volume.ErrNotFound):
		return &kindError{ErrNotFound, err}
	case is(ErrConflict, container.ErrNameTaken, volume.ErrExists):
		return &kindError{ErrConflict, err}
	case is(ErrInvalid, container.ErrName, container.ErrAmbiguous, image.ErrReference, volume.ErrName, volume.ErrOptions):
		return &kindError{ErrInvalid, err}
	default:
		return err
	}
}
