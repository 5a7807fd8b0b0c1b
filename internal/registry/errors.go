package registry

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
)

// plain takes the method and URL off a client error; whoever prints it names the endpoint.
func plain(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	return err
}

// explain adds what to do about a certificate that nobody vouches for.
func explain(ep Endpoint, err error) error {
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) {
		return fmt.Errorf("%w (if it is to be trusted: its authority's certificate belongs into /etc/conex/certs.d/%s/ca.crt)", err, ep.Host)
	}
	return err
}

// endpointError says which endpoint failed.
type endpointError struct {
	ep  Endpoint
	err error
}

func (e *endpointError) Error() string {
	kind := "registry "
	if e.ep.Mirror {
		kind = "mirror "
	}
	return kind + e.ep.String() + ": " + e.err.Error()
}

func (e *endpointError) Unwrap() error { return e.err }

// lineError is several errors in one line. It is, for errors.Is, the last of them: what the registry itself said counts, the mirrors
// only explain.
type lineError struct{ errs []error }

func joinLine(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	return &lineError{errs}
}

func (e *lineError) Error() string {
	s := make([]string, len(e.errs))
	for i, err := range e.errs {
		s[i] = err.Error()
	}
	return strings.Join(s, "; ")
}

func (e *lineError) Unwrap() error { return e.errs[len(e.errs)-1] }

// Cause returns what the registry itself, the last that was asked, answered to a Resolve, without the endpoints' names. Behind it stand
// in brackets the mirrors that failed otherwise than by not having the image: it may lie there.
func Cause(err error) error {
	var failed []string
	var line *lineError
	if errors.As(err, &line) {
		for _, e := range line.errs[:len(line.errs)-1] {
			if !errors.Is(e, ErrManifestUnknown) && !errors.Is(e, ErrNameUnknown) {
				failed = append(failed, e.Error())
			}
		}
	}
	var ee *endpointError
	for errors.As(err, &ee) {
		err = ee.err
	}
	if len(failed) > 0 {
		return fmt.Errorf("%w (%s)", err, strings.Join(failed, "; "))
	}
	return err
}

// AnswerError is an answer that is no success.
type AnswerError struct {
	// Status is the HTTP status code.
	Status int
	// Code and Message are the first error of the body, as the distribution specification has them; both may be "".
	Code, Message string

	after string // Retry-After
}

func (e *AnswerError) Error() string {
	code := strings.ToLower(strings.ReplaceAll(e.Code, "_", " "))
	switch {
	case code != "" && e.Message != "":
		return code + ": " + e.Message
	case code != "":
		return code
	case e.Status == http.StatusTooManyRequests:
		return "too many requests: the registry limits how much may be pulled; try again later"
	}
	return fmt.Sprintf("unexpected status %d %s", e.Status, http.StatusText(e.Status))
}

// Is maps the specification's codes, and statuses without one, to this package's sentinels.
func (e *AnswerError) Is(target error) bool {
	switch e.Code {
	case "MANIFEST_UNKNOWN", "TAG_INVALID", "NOT_FOUND":
		return target == ErrManifestUnknown
	case "NAME_UNKNOWN":
		return target == ErrNameUnknown
	case "DENIED", "UNAUTHORIZED":
		return target == ErrDenied
	}
	switch e.Status {
	case http.StatusNotFound:
		return target == ErrManifestUnknown
	case http.StatusUnauthorized, http.StatusForbidden:
		return target == ErrDenied
	}
	return false
}

// answerError reads an answer that is no success.
func answerError(resp *http.Response) error {
	e := &AnswerError{Status: resp.StatusCode, after: resp.Header.Get("Retry-After")}
	var body struct {
		Errors []struct{ Code, Message string } `json:"errors"`
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	if err == nil && json.Unmarshal(raw, &body) == nil && len(body.Errors) > 0 {
		e.Code, e.Message = oneLine(body.Errors[0].Code), oneLine(body.Errors[0].Message)
	}
	return e
}

// oneLine makes a foreign text fit to be printed: no control characters (a terminal would obey them), no more than 300 bytes.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return ' '
		}
		return r
	}, s)
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "..."
	}
	return strings.TrimSpace(s)
}

// refusedError is a way that a registry shows and that we don't go. Asking again would not change that.
type refusedError struct{ text string }

func (e *refusedError) Error() string { return e.text }

func refused(format string, args ...any) error { return &refusedError{fmt.Sprintf(format, args...)} }

// isAnswer reports whether err is something that a registry said, as opposed to a failure to reach one.
func isAnswer(err error) bool {
	var a *AnswerError
	var r *refusedError
	return errors.As(err, &a) || errors.As(err, &r) || errors.Is(err, ErrMismatch) || errors.Is(err, ErrUnsupported) || errors.Is(err, ErrDenied)
}
