package engine

import (
	"bufio"
	"context"
	"errors"
	"io"
	"time"

	"conex/internal/control"
	"conex/internal/logs"
)

// LogsRequest asks for a container's output.
type LogsRequest struct {
	Container string
	// Follow goes on until the container ends.
	Follow bool
	// Timestamps puts the time before each line, Details the container's labels and variables that its log options name.
	Timestamps, Details bool
	// Tail is how many of the last lines to begin with; -1 means all.
	Tail int
	// Since and Until bound the time of the lines, if set.
	Since, Until time.Time
	// Stdout and Stderr receive the two streams; nil leaves one out.
	Stdout, Stderr io.Writer
}

// timestamp is Docker's format for log lines: nanoseconds with all their digits, so that lines align.
const timestamp = "2006-01-02T15:04:05.000000000Z07:00"

// Logs copies a container's log. A container whose driver keeps none is ErrInvalid.
func (e *Engine) Logs(ctx context.Context, req LogsRequest) error {
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return err
	}
	opts, err := e.logOptions(n.Record)
	if err != nil {
		return err
	}
	if !opts.Readable() {
		return invalid("configured logging driver does not support reading")
	}
	if req.Stdout == nil && req.Stderr == nil {
		return invalid("Bad parameters: you must choose at least one stream")
	}
	o := logs.ReadOptions{
		Follow: req.Follow && n.Alive() != nil, Tail: req.Tail, Since: req.Since, Until: req.Until,
		Stdout: req.Stdout != nil, Stderr: req.Stderr != nil,
	}
	if o.Follow {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		done := make(chan struct{})
		o.Done = done
		go func() { // ends with the container, or with ctx
			defer close(done)
			e.untilEnded(ctx, n.Record.ID)
		}()
	}
	details := ""
	if req.Details {
		c := logs.Describe(n.Record)
		if details, err = c.Details(opts); err != nil {
			return err
		}
	}
	p := &logPrinter{timestamps: req.Timestamps, details: details}
	for i, w := range []io.Writer{req.Stdout, req.Stderr} {
		p.out[i] = bufio.NewWriterSize(w, 64<<10) // a writer that is nil gets nothing
	}
	o.CaughtUp = p.flush
	err = logs.Read(ctx, e.Containers().Dir(n.Record.ID, "log"), o, p.print)
	return errors.Join(err, p.flush())
}

// logPrinter writes lines in the order in which they come, in large pieces.
type logPrinter struct {
	out        [2]*bufio.Writer
	timestamps bool
	details    string
	// time is the time whose prefix is in prefix: many lines have the same.
	time   time.Time
	prefix []byte
}

func (p *logPrinter) print(r logs.Record) error {
	w, other := p.out[0], p.out[1]
	if r.Stream == "stderr" {
		w, other = other, w
	}
	if other.Buffered() > 0 {
		if err := other.Flush(); err != nil {
			return err
		}
	}
	if !r.Continued && (p.timestamps || p.details != "") {
		if p.prefix == nil || !r.Time.Equal(p.time) {
			p.time, p.prefix = r.Time, p.prefix[:0]
			if p.timestamps {
				p.prefix = append(r.Time.UTC().AppendFormat(p.prefix, timestamp), ' ')
			}
			p.prefix = append(p.prefix, p.details...)
		}
		if _, err := w.Write(p.prefix); err != nil {
			return err
		}
	}
	_, err := w.Write(r.Line)
	return err
}

// flush writes what is kept. Of the two streams only one has something.
func (p *logPrinter) flush() error {
	return errors.Join(p.out[0].Flush(), p.out[1].Flush())
}

// untilEnded returns when the container has ended for good.
func (e *Engine) untilEnded(ctx context.Context, id string) {
	for ctx.Err() == nil {
		_, err := e.client(id).Wait(ctx)
		if err != nil && !errors.Is(err, control.ErrGone) {
			return
		}
		n, serr := e.snapshot(ctx, id)
		if serr != nil || n.Alive() == nil {
			return
		}
		if errors.Is(err, control.ErrGone) {
			// A monitor that lives but doesn't listen yet or any more is about to change its state.
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
}
