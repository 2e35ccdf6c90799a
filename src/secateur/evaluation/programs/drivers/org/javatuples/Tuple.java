package org.javatuples;

import java.io.Serializable;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.Iterator;
import java.util.List;

/** What problems for Java use of the javatuples library: fixed numbers of values that compare by value. */
public abstract class Tuple implements Iterable<Object>, Serializable, Comparable<Tuple> {
    private final List<Object> values;

    Tuple(Object... values) {
        this.values = Collections.unmodifiableList(new ArrayList<>(Arrays.asList(values)));
    }

    public final int getSize() {
        return values.size();
    }

    public final Object getValue(int position) {
        return values.get(position);
    }

    public final boolean contains(Object value) {
        return values.contains(value);
    }

    public final int indexOf(Object value) {
        return values.indexOf(value);
    }

    public final List<Object> toList() {
        return new ArrayList<>(values);
    }

    public final Object[] toArray() {
        return values.toArray();
    }

    @Override
    public final Iterator<Object> iterator() {
        return values.iterator();
    }

    @Override
    @SuppressWarnings({"unchecked", "rawtypes"})
    public int compareTo(Tuple other) {
        for (int at = 0; at < Math.min(getSize(), other.getSize()); at++) {
            int order = ((Comparable) values.get(at)).compareTo(other.values.get(at));
            if (order != 0) {
                return order;
            }
        }
        return Integer.compare(getSize(), other.getSize());
    }

    @Override
    public final boolean equals(Object other) {
        return other != null && other.getClass() == getClass() && values.equals(((Tuple) other).values);
    }

    @Override
    public final int hashCode() {
        return values.hashCode();
    }

    @Override
    public final String toString() {
        return values.toString();
    }
}
