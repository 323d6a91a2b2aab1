struct Softsign {
  static Vec value(Vec u, Parameters) { return u / ((Value)1 + absolute(u)); }
  static Vec derivative(Vec u, Parameters) {
    const Vec r = (Value)1 / ((Value)1 + absolute(u));
    return r * r;
  }
};

